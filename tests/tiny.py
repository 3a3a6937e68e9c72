"""A laboratory small enough for tests: real text, two experiments, a sweep, and the two trained runs."""

from __future__ import annotations

import copy
import functools
import json
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from simba_lab.cli.main import main
from simba_lab.sweep import SweepConfig, read_sweep

N_CONTEXT, N_SUFFIX, LENGTH = 96, 16, 128

EXPERIMENT: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"model": {"d_model": 24, "n_layer": 4, "d_state": 4}, "learning_rate": 0.01, "warmup_steps": 2},
    "data": {
        "class_path": "simba_lab.data.TextData",
        "init_args": {
            "vocab_size": 300, "length": LENGTH, "batch_size": 4, "validation_windows": 4, "test_windows": 4,
        },
    },
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 1,
        "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
    },
    "checkpoint": {"every_n_steps": 2},
}  # fmt: skip

SWEEP: dict[str, Any] = {
    "windows": 12,
    "n_context": N_CONTEXT,
    "n_suffix": N_SUFFIX,
    "batch_size": 4,
    "budget": {"reference": "small", "tolerance": 0.01},
    "arms": [
        {"kind": "smaller_dense", "name": "small", "experiment": "small.yaml"},
        {"kind": "shorter_context"},
        {"kind": "dense"},
        {"schedule": "linear", "criterion": "global_impact"},
        {
            "schedule": {"class_path": "highway_top", "init_args": {"from_layer": 1}},
            "criterion": [{"class_path": "random", "init_args": {"seed": seed}} for seed in (0, 1)],
        },
    ],
    "statistics": {"resamples": 200},
}


def with_changes(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested ``values`` in which dotted keys of ``changes`` have new values."""
    changed = copy.deepcopy(dict(values))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = changed
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = copy.deepcopy(value)
    return changed


def write_yaml(path: Path, values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(with_changes(values, changes or {}), sort_keys=False), encoding="utf-8")
    return path


def write_corpus(path: Path, documents: int = 40, characters: int = 3000) -> Path:
    """JSON lines: the heads of standard-library modules."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    heads = [(module.stem, module.read_text(encoding="utf-8", errors="ignore")[:characters]) for module in modules]
    rows = [{"title": name, "text": text} for name, text in heads if len(text) == characters][:documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def simba_lab(*arguments: str | Path) -> int:
    """Exit code of a ``simba-lab`` command, run in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def mistake(capsys: Any, *arguments: str | Path) -> str:
    """The one line on standard error with which a command refuses its input."""
    capsys.readouterr()
    code = simba_lab(*arguments)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), (code, error)
    assert error.startswith("simba-lab") and "Traceback" not in error
    return error


@dataclass(frozen=True)
class Lab:
    """A folder with experiments on ``text`` and their trained runs ``runs/base`` and ``runs/small``."""

    folder: Path
    text: Path
    cache: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "base"

    def experiment(self, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
        """An experiment file on the lab's text whose run folder is ``runs/NAME`` beside it."""
        given = {
            "data.init_args.source": str(self.text),
            "data.init_args.cache_dir": str(self.cache),
            "trainer.default_root_dir": str(path.parent / "runs" / path.stem),
        }
        return write_yaml(path, EXPERIMENT, given | dict(changes or {}))

    def sweep(self, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
        """A sweep file over the lab's trained runs that writes into ``NAME`` beside it."""
        given: dict[str, Any] = {"experiment": str(self.folder / "base.yaml"), "folder": str(path.parent / path.stem)}
        write_yaml(path, SWEEP | given, changes)
        text = path.read_text(encoding="utf-8").replace("small.yaml", str(self.folder / "small.yaml"))
        path.write_text(text, encoding="utf-8")
        return path

    def sweep_config(self, path: Path, changes: Mapping[str, Any] | None = None) -> SweepConfig:
        return read_sweep(self.sweep(path, changes))


@functools.cache
def lab(base: Path) -> Lab:
    """The laboratory below ``base``, trained once per process."""
    folder = base / "lab"
    folder.mkdir()
    made = Lab(folder, write_corpus(folder / "text.jsonl"), folder / "cache")
    for name, changes in (("base", {}), ("small", {"model.model.d_model": 18})):
        assert simba_lab("fit", "--config", made.experiment(made.folder / f"{name}.yaml", changes)) == 0
    return made
