"""``simba-lab flops``: the numbers of the budget room, in tables and JSON; a bad flag is named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simba_lab.cli.main import main
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import PUBLISHED

OWN = ["--d-model", "12", "--n-layer", "4", "--vocab-size", "30"]
WINDOW = ["--n-context", "40", "--n-suffix", "6"]
CONFIG = ModelConfig(12, 4, 30)


def flops(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    target = tmp_path / "flops.json"
    assert main(["flops", *arguments, "--json", str(target)]) == 0
    return json.loads(target.read_text())


def test_dense_json_sums_up(tmp_path: Path) -> None:
    result = flops(tmp_path, *OWN, *WINDOW)
    assert result["flops"] == LanguageModel(CONFIG).flops(40, 6).total == result["dense_flops"]
    assert sum(result["by_op"].values()) == sum(result["by_layer"].values()) == result["flops"]
    assert list(result["by_layer"]) == ["0", "1", "2", "3", "head"]
    assert result["convention"].startswith("FLOPs = 2 x multiply-adds")
    assert (result["share_of_dense"], result["keep_counts"], result["pruning"]) == (1.0, [40] * 4, None)
    assert result["verified"] is True
    assert result["parameters"] == sum(p.numel() for p in LanguageModel(CONFIG).parameters())
    assert "training" not in result


def test_pruned_json_and_training(tmp_path: Path) -> None:
    flags = ["--criterion", "global_impact", "--schedule", "linear", "--mean-keep", "0.55", "--training"]
    result = flops(tmp_path, *OWN, *WINDOW, *flags)
    model = LanguageModel(CONFIG).sparsified(mean_keep=0.55)
    breakdown = model.flops(40, 6)
    assert result["by_op"] == breakdown.by_op()
    assert {"score", "select"} <= set(result["by_op"])
    assert result["keep_counts"] == model.keep_counts(40) == [40, 28, 16, 4]
    assert (result["mean_keep"], result["final_keep"]) == (0.55, 0.1)
    assert result["share_of_dense"] == breakdown.total / LanguageModel(CONFIG).flops(40, 6).total
    assert result["training"]["flops"] == breakdown.training().total
    assert result["pruning"]["criterion"] == {
        "class_path": "global_impact",
        "init_args": {"reduce": "max", "gated": False},
    }


def test_the_issues_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = flops(
        tmp_path, "--shape", "mamba-130m", "--n-context", "2048", "--n-suffix", "64",
        "--criterion", "global_impact", "--schedule", "linear", "--mean-keep", "0.55",
    )  # fmt: skip
    assert result["flops"] == 227_934_834_694
    assert result["dense_flops"] == 395_549_503_488
    assert result["model"] == PUBLISHED["mamba-130m"].to_dict()
    printed = capsys.readouterr().out
    for text in (
        "227,934,834,694 FLOPs = 227.9 GFLOPs",
        "0.5762 of dense",
        "2 x multiply-adds",
        "129,135,360 parameters",
    ):
        assert text in printed
    assert "fvcore counts the same in all 191 (layer, op) pairs" in printed


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        (["--schedule", "uniform", "--schedule-arg", "keep=0.5"], [40, 20, 20, 20]),
        (["--schedule", "linear", "--final-keep", "0.1", "--schedule-arg", "multiple_of=8"], [40, 32, 16, 8]),
        (["--schedule", '{"class_path": "knots", "init_args": {"values": [0.5, 0.25]}}'], [40, 27, 17, 10]),
        (["--schedule", "knots", "--schedule-arg", "values=[0.5, 0.25]"], [40, 27, 17, 10]),
        (["--schedule", "simba_lab.pruning.schedules.Uniform", "--mean-keep", "0.4"], [40, 8, 8, 8]),
    ],
    ids=str,
)
def test_schedules_by_name_class_path_and_json(tmp_path: Path, flags: list[str], counts: list[int]) -> None:
    assert flops(tmp_path, *OWN, *WINDOW, *flags)["keep_counts"] == counts


def test_head_and_protection_are_recorded(tmp_path: Path) -> None:
    spec = json.dumps({"class_path": "global_impact", "init_args": {"reduce": "l2"}})
    flags = ["--mean-keep", "0.55", "--criterion", spec, "--protect-recent", "0.25", "--head", "all", "--no-verify"]
    result = flops(tmp_path, *OWN, *WINDOW, *flags)
    assert (result["head"], result["verified"]) == ("all", False)
    assert result["pruning"]["protect_recent"] == 0.25
    assert result["pruning"]["criterion"]["init_args"]["reduce"] == "l2"
    assert result["by_op"]["head"] == 2 * (6 + 4) * 12 * 32


def test_a_users_criterion_by_class_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flops_user_file.py").write_text(
        "from simba_lab import Criterion\n\n\n"
        "class Loudest(Criterion):\n"
        "    def score(self, signals):\n"
        "        return (signals.x * signals.x).sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--criterion", "flops_user_file.Loudest", "--schedule", "uniform", "--schedule-arg", "keep=0.5"]
    assert flops(tmp_path, *OWN, *WINDOW, *flags)["by_op"]["score"] == 40 * 2 * 24


def test_a_saved_model_keeps_its_pruning(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("simba_lab.checkpoint")
    model = LanguageModel(CONFIG).sparsified(final_keep=0.1)
    checkpoint.save_model(tmp_path / "run", model)
    saved = ["--checkpoint", str(tmp_path / "run")]
    assert flops(tmp_path, *saved, *WINDOW)["flops"] == model.flops(40, 6).total
    assert flops(tmp_path, *saved, *WINDOW, "--final-keep", "1.0")["share_of_dense"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "mamba-13m", *WINDOW], "--shape: shape 'mamba-13m' is unknown (did you mean mamba-130m?)"),
        (WINDOW, "give one of --shape, --checkpoint, or sizes of your own"),
        (["--shape", "mamba-130m", *OWN, *WINDOW], "give one of --shape, --checkpoint, or sizes of your own"),
        (["--d-model", "4", *WINDOW], "--n-layer and --vocab-size must be given too"),
        ([*OWN[:-1], "0", *WINDOW], "model.vocab_size must be an integer of at least 1, got 0"),
        ([*OWN, "--n-context", "0"], "--n-context must be at least 1, got 0"),
        ([*OWN, "--n-context", "4", "--n-suffix", "-1"], "--n-suffix must be at least 0, got -1"),
        ([*OWN, *WINDOW, "--criterion", "globl"], "--criterion: criterion: 'globl' is unknown"),
        ([*OWN, *WINDOW, "--schedule", "lin"], "--schedule: schedule: 'lin' is unknown (did you mean linear?)"),
        ([*OWN, *WINDOW, "--criterion", "norm"], "final_keep is not set; give it, or mean_keep"),
        ([*OWN, *WINDOW, "--mean-keep", "1.5"], "--mean-keep: schedule linear: mean_keep must lie in (0, 1], got 1.5"),
        ([*OWN, *WINDOW, "--final-keep", "0"], "--final-keep: schedule linear: final_keep must lie in (0, 1], got 0"),
        ([*OWN, *WINDOW, "--mean-keep", "0.6", "--final-keep", "0.5"], "give mean_keep or final_keep, not both"),
        ([*OWN, *WINDOW, "--schedule-arg", "keep"], "--schedule-arg: expected KEY=VALUE, got 'keep'"),
        ([*OWN, *WINDOW, "--schedule-arg", "kep=1"], "--schedule-arg: schedule linear: unknown option 'kep'"),
        ([*OWN, *WINDOW, "--schedule", "{bad"], "--schedule: expected a JSON object with class_path"),
        (
            [*OWN, *WINDOW, "--mean-keep", "0.6", "--protect-recent", "2"],
            "--protect-recent: protect_recent must lie in",
        ),
        (["--checkpoint", "/nowhere/at/all", *WINDOW], "--checkpoint: checkpoint: /nowhere/at/all does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_value_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    target = tmp_path / "flops.json"
    assert main(["flops", *arguments, "--json", str(target)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not target.exists()
