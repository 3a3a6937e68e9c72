"""Runs that an older release finished: keys that it did not know yet do not make them other runs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from simba_lab.errors import InputError
from simba_lab.training import Experiment, read_experiment

GIVEN = {"model.pruning": {"n_context": tiny.N_CONTEXT, "mean_keep": 0.6}, "model.weight_decay": 0.2}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The lab's experiment with two keys of its own."""
    lab = tiny.lab(tmp_path_factory.getbasetemp())
    return read_experiment(lab.experiment(tmp_path_factory.mktemp("asked") / "base.yaml", GIVEN))


def finished(asked: Experiment, folder: Path, without: str = "", **changed: Any) -> Experiment:
    """``asked`` beside a finished run whose config lacks one dotted key and has others changed."""
    saved = copy.deepcopy(asked.resolved)
    *parents, last = without.split(".")
    place = saved
    for parent in parents:
        place = place[parent]
    if without:
        del place[last]
    tiny.write_yaml(folder / "config.yaml", saved, {key.replace("__", "."): value for key, value in changed.items()})
    (folder / "run.json").write_text('{"status": "done"}')
    return dataclasses.replace(asked, folder=folder)


@pytest.mark.parametrize(
    "key",
    ["model.model.headdim", "model.model.tie_embeddings", "model.betas", "model.pruning.convolution",
     "data.init_args.recall_share", "data.init_args.seed"],
)  # fmt: skip
def test_a_key_that_a_finished_run_lacks_stands_for_its_default(asked: Experiment, tmp_path: Path, key: str) -> None:
    experiment = finished(asked, tmp_path / "run", without=key)
    assert experiment.is_trained()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) != experiment.resolved


@pytest.mark.parametrize(
    "key", ["model.weight_decay", "model.model.d_model", "model.pruning.mean_keep", "data.init_args.length"]
)
def test_a_key_whose_default_is_not_what_is_asked_makes_another_run(
    asked: Experiment, tmp_path: Path, key: str
) -> None:
    """Nor does a key without a default: no run was without it."""
    with pytest.raises(InputError, match=f"run holds a run with another {key} than"):
        finished(asked, tmp_path / "run", without=key).is_trained()


def test_a_key_that_differs_makes_another_run_whatever_else_is_missing(asked: Experiment, tmp_path: Path) -> None:
    experiment = finished(asked, tmp_path / "run", "model.model.headdim", model__model__d_state=8)
    with pytest.raises(InputError, match="another model.model.d_state than"):
        experiment.is_trained()
    experiment = finished(asked, tmp_path / "run", "model.betas", model__model__of_yore=3)
    with pytest.raises(InputError, match="another model.model.of_yore than"):
        experiment.is_trained()
