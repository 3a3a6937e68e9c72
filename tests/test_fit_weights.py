"""A fit that starts from finished weights: what it reads, refuses, records, and how it resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_training import Stop, assert_same_weights, stop_before_step

import simba_lab
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.training import read_experiment
from simba_lab.training.start import start_from

STEPS = 4
STANDING = {"model.learning_rate": 1e-12, "model.weight_decay": 0.0}
PRUNED = {"model.pruning": {"n_context": 96, "criterion": "norm", "mean_keep": 0.55, "convolution": "adjacent"}}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def experiment(lab: tiny.Lab, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A fit of a few steps from the lab's finished run, into ``folder/runs/tuned``."""
    given = {"model.weights": str(lab.run), "trainer.max_steps": STEPS}
    return lab.experiment(folder / "tuned.yaml", given | dict(changes or {}))


def fit(lab: tiny.Lab, folder: Path, changes: Mapping[str, Any] | None = None, *arguments: str) -> Path:
    """The run folder of such a fit."""
    assert tiny.simba_lab("fit", "--config", experiment(lab, folder, changes), *arguments) == 0
    return folder / "runs" / "tuned"


@pytest.fixture(scope="module")
def tuned(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(lab, tmp_path_factory.mktemp("tuned"))


def refusal(lab: tiny.Lab, folder: Path, capsys: pytest.CaptureFixture[str], changes: Mapping[str, Any]) -> str:
    """The line with which a fit is refused, which leaves no run folder."""
    line = tiny.mistake(capsys, "fit", "--config", experiment(lab, folder, changes))
    assert not (folder / "runs" / "tuned").exists()
    return line


def record_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def loss_at_the_end(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["test/loss"] for row in rows if "test/loss" in row)


def started(lab: tiny.Lab, weights: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """A model of the lab's shape that starts from ``weights``, and what its record says."""
    model = LanguageModel(simba_lab.load(lab.run).config, seed=3)
    return model, start_from(str(weights), model, None)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("changes", [{}, PRUNED], ids=["dense", "pruned"])
def test_a_fit_that_hardly_moves_has_the_loss_of_its_weights(
    lab: tiny.Lab, tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    run = fit(lab, tmp_path, STANDING | changes)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, lab.run))
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-9
    same = loss_at_the_end(run) == pytest.approx(loss_at_the_end(lab.run), abs=1e-6)
    assert same == (changes == {})


def test_the_record_says_what_it_started_from_and_charges_its_own_steps(lab: tiny.Lab, tuned: Path) -> None:
    record, base = record_of(tuned), record_of(lab.run)
    digest = sha256(lab.run / "model.safetensors")
    assert record["started_from"] == {"weights": str(lab.run), "sha256": {"model.safetensors": digest}}
    assert record["step"] == STEPS != base["step"] and base["started_from"] is None
    assert record["training_flops"] * base["step"] == base["training_flops"] * STEPS
    assert loss_at_the_end(tuned) < loss_at_the_end(lab.run)


def test_a_stopped_fit_continues_as_if_it_had_not_been(
    lab: tiny.Lab, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_before_step(patch, 3)
        fit(lab, tmp_path)
    run = fit(lab, tmp_path, None, "--ckpt_path", "last")
    same = ("status", "started_from", "step", "tokens", "training_flops_by_op")
    assert [record_of(run)[key] for key in same] == [record_of(tuned)[key] for key in same]
    assert_same_weights(run, tuned)


@pytest.mark.parametrize("weights", [None, "the tuned ones"])
def test_a_checkpoint_of_another_start_is_refused(
    lab: tiny.Lab, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str | None
) -> None:
    config = experiment(lab, tmp_path, {"model.weights": weights and str(tuned)})
    last = tuned / "checkpoints" / "last.ckpt"
    line = tiny.mistake(capsys, "fit", "--config", config, "--ckpt_path", last)
    assert f"ckpt_path: the checkpoint's fit began from {lab.run}" in line and "model.weights" in line


def test_weights_become_fp32_whatever_the_file_holds(lab: tiny.Lab, tmp_path: Path) -> None:
    narrow = {name: weight.bfloat16() for name, weight in load_file(lab.run / "model.safetensors").items()}
    save_file(narrow, tmp_path / "model.safetensors")
    (tmp_path / "model.json").write_bytes((lab.run / "model.json").read_bytes())
    model, _ = started(lab, tmp_path)
    held = model.state_dict()
    assert all(torch.equal(held[name], weight.float()) for name, weight in narrow.items())
    assert {weight.dtype for weight in held.values()} == {torch.float32}


def test_a_checkpoint_file_will_do(lab: tiny.Lab) -> None:
    """That of the run's end holds the very weights of its folder."""
    last = lab.run / "checkpoints" / "last.ckpt"
    model, record = started(lab, last)
    assert record["sha256"] == {"last.ckpt": sha256(last)}
    assert_holds(model, lab.run)


def assert_holds(model: LanguageModel, run: Path) -> None:
    expected = simba_lab.load(run).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_the_test_command_measures_the_weights(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.simba_lab("test", "--config", experiment(lab, tmp_path)) == 0
    assert f"{loss_at_the_end(lab.run):.6f}" in capsys.readouterr().out


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"model.model.d_model": 30}, "has d_model 24, model.model asks for 30"),
    "norm": ({"model.model.norm_eps": 1e-3}, "has norm_eps 1e-05, model.model asks for 0.001"),
    "vocabulary": ({"data.init_args.tokenizer": "bytes"}, "has vocab_size 300, the data's tokenizer has 257"),
    "missing": ({"model.weights": "nowhere/at-all/here"}, "nowhere/at-all/here does not exist"),
    "no run": ({"model.weights": "tests"}, "tests holds no model.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_do_not_fit_are_refused(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changes, reason = REFUSED[name]
    line = refusal(lab, tmp_path, capsys, changes)
    assert "model.weights: " in line and reason in line


def test_a_tokenizer_of_the_same_size_is_another_one(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"data.init_args.source": str(tiny.write_corpus(tmp_path / "other.jsonl", 12, 2000))}
    line = refusal(lab, tmp_path, capsys, other)
    assert f"model.weights: {lab.run / 'tokenizer.json'} is not the data's tokenizer" in line


def test_a_fit_does_not_replace_the_weights_it_starts_from(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (lab.run / "model.safetensors").read_bytes()
    config = experiment(lab, tmp_path, {"trainer.default_root_dir": str(lab.run)})
    assert f"model.weights: {lab.run} is the run folder" in tiny.mistake(capsys, "fit", "--config", config)
    assert (lab.run / "model.safetensors").read_bytes() == before


def test_an_experiment_is_read_where_its_weights_are_not(lab: tiny.Lab, tuned: Path) -> None:
    """Runs are evaluated elsewhere, too; and one that began elsewhere is not the run of the experiment."""
    assert read_experiment(tuned.parents[1] / "tuned.yaml").is_trained()
    moved = tiny.write_yaml(
        tuned.parents[1] / "moved.yaml",
        yaml.safe_load((tuned.parents[1] / "tuned.yaml").read_text()),
        {"model.weights": "nowhere"},
    )
    with pytest.raises(InputError, match="another model.weights"):
        read_experiment(moved).is_trained()


def test_shards_have_a_digest_each(lab: tiny.Lab, tmp_path: Path) -> None:
    """state-spaces' and transformers' folders may hold their weights in several files."""
    folder = tmp_path / "converted"
    assert tiny.simba_lab("convert", lab.run, folder, "--format", "transformers") == 0
    weights = load_file(folder / "model.safetensors")
    places = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in weights if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    model, record = started(lab, folder)
    digests = {shard: sha256(folder / shard) for shard in ("0.safetensors", "1.safetensors")}
    assert record == {"weights": str(folder), "sha256": digests}
    assert_holds(model, lab.run)
