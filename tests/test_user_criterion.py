"""A criterion in a file of the user's own, named by class path, works wherever a built-in one does."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

import simba_lab

OPEN_GATE = '''
from __future__ import annotations

import torch
from torch import Tensor

from simba_lab import Criterion, Signals


class OpenGate(Criterion):
    """Keeps the tokens whose gate lets most through."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def score(self, signals: Signals) -> Tensor:
        return torch.nn.functional.silu(signals.z).abs().pow(self.power).sum(-1)
'''
CRITERION = {"class_path": "my_criteria.OpenGate", "init_args": {"power": 2.0}}
FLOPS_PER_CHANNEL = 4  # silu, abs, pow and the sum: one each per token and inner channel
CHANNELS = 2 * tiny.EXPERIMENT["model"]["model"]["d_model"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds ``my_criteria.py`` and from which commands are called."""
    (tmp_path / "my_criteria.py").write_text(OPEN_GATE.lstrip(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("my_criteria", None)


def scoring(counts: list[int]) -> int:
    """FLOPs of scoring one sequence: every layer whose successor keeps fewer tokens is scored."""
    scored = [count for count, after in zip(counts, counts[1:], strict=False) if after < count]
    return FLOPS_PER_CHANNEL * CHANNELS * sum(scored)


def test_the_file_is_as_short_as_promised() -> None:
    assert len([line for line in OPEN_GATE.strip().splitlines() if line]) <= 15


def test_training_pruned_by_it(lab: tiny.Lab, working_folder: Path) -> None:
    pruning = {"n_context": 96, "criterion": CRITERION, "mean_keep": 0.6}
    changes = {"model.pruning": pruning, "trainer.max_steps": 2}
    assert tiny.simba_lab("fit", "--config", lab.experiment(working_folder / "mine.yaml", changes)) == 0
    folder = working_folder / "runs" / "mine"
    model, record = simba_lab.load(folder), json.loads((folder / "run.json").read_text())
    assert type(model.pruning.criterion).__name__ == "OpenGate" and model.pruning.criterion.power == 2.0
    assert record["training_flops_by_op"]["score"] == 2 * 4 * scoring(model.keep_counts(96))
    assert tiny.simba_lab("fit", "--config", working_folder / "mine.yaml", "--ckpt_path", "last") == 0


def test_a_sweep_compares_and_reports_it(
    lab: tiny.Lab, working_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arms = [tiny.SWEEP["arms"][0], {"schedule": "linear", "criterion": [CRITERION, "norm"]}]
    assert tiny.simba_lab("sweep", "--config", lab.sweep(working_folder / "mine.yaml", {"arms": arms})) == 0
    results = json.loads((working_folder / "mine" / "results.json").read_text())
    _, mine, norm = results["arms"]
    assert (mine["name"], mine["criterion"]) == ("linear:OpenGate(power=2.0)", "my_criteria.OpenGate")
    assert mine["flops_by_op"]["score"] == scoring(mine["keep_counts"]) > 2 * norm["flops_by_op"]["score"]
    assert abs(mine["flops"] / results["budget_flops"] - 1) <= 0.01
    assert mine["mean_keep"] < norm["mean_keep"], "what it spends on scores it cannot spend on tokens"
    assert mine["spec"]["pruning"]["criterion"] == CRITERION
    assert "linear:OpenGate(power=2.0)" in capsys.readouterr().out
    assert "OpenGate(power=2.0)" in (working_folder / "mine" / "report.html").read_text()


def test_eval_measures_it(lab: tiny.Lab, capsys: pytest.CaptureFixture[str]) -> None:
    arm = "linear:my_criteria.OpenGate@0.6"
    sizes = ("--windows", 4, "--n-context", 60, "--n-suffix", 8, "--json", "e.json")
    assert tiny.simba_lab("eval", "--checkpoint", lab.run, "--arms", arm, *map(str, sizes)) == 0
    (row,) = json.loads(Path("e.json").read_text())["arms"]
    own = simba_lab.load(lab.run).sparsified("my_criteria.OpenGate", "linear", mean_keep=0.6)
    assert row["name"] == arm and row["flops"] == own.flops(60, 8).total
    assert own.flops(60, 8).by_op()["score"] == scoring(row["keep_counts"])


@pytest.mark.parametrize(
    ("criterion", "problem"),
    [
        ("my_criteria.ClosedGate", "module 'my_criteria' has no class 'ClosedGate'"),
        ("your_criteria.OpenGate", "cannot import 'your_criteria'"),
        ("my_criteria.Signals", "is not a subclass of simba_lab.pruning.criteria.Criterion"),
        ({"class_path": "my_criteria.OpenGate", "init_args": {"powr": 2}}, "unknown option 'powr'; its options: power"),
    ],
)
def test_a_mistake_in_naming_it_is_explained(
    lab: tiny.Lab, working_folder: Path, capsys: pytest.CaptureFixture[str], criterion: Any, problem: str
) -> None:
    arms = [tiny.SWEEP["arms"][0], {"schedule": "linear", "criterion": criterion}]
    file = lab.sweep(working_folder / "mine.yaml", {"arms": arms})
    assert problem in tiny.mistake(capsys, "sweep", "--config", file)
    assert not (working_folder / "mine").exists()
