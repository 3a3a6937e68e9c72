"""Experiment files as a sweep takes them: built, not trained.

Such a file says how a model is trained (then it is a config of ``simba-lab fit``), or names a run that is finished and
the text to measure it on (then nothing can train it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from simba_lab.checkpoint import TOKENIZER_FILE, load
from simba_lab.data import TextData, Tokenizer
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.training.lightning_cli import CONFIG_FILE, Parser, run_cli, settle_seeds
from simba_lab.training.mistakes import blaming_config, read_yaml
from simba_lab.training.record import RUN_FILE

TRAINED = "trained"
"""The key by which a file names the folder of a finished run; ``data`` is the only other one it may then have."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment file describes, built but not trained; ``parser`` knows the defaults of its keys."""

    path: Path
    folder: Path
    model: LanguageModel
    data: LightningDataModule
    resolved: dict[str, Any]
    parser: Parser

    def is_trained(self) -> bool:
        """Whether the run folder holds the finished run of just this experiment.

        A key that the run's config lacks, since no release knew it then, stands for its default. Raises InputError if
        the folder holds the run of another experiment.
        """
        if TRAINED in self.resolved:
            return True
        record, config = self.folder / RUN_FILE, self.folder / CONFIG_FILE
        if not (record.is_file() and config.is_file()):
            return False
        saved = _completed(read_yaml(config, "experiment"), self.resolved, self.parser)
        differing = _difference(saved, self.resolved)
        if differing:
            raise InputError(
                f"{self.folder} holds a run with another {differing} than {self.path}; "
                "move the folder away or change trainer.default_root_dir"
            )
        return read_yaml(record, "experiment").get("status") == "done"


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file strictly. Raises InputError for a missing file, an unknown key or a wrong value."""
    if not Path(path).is_file():
        raise InputError(f"experiment: {path} does not exist")
    if TRAINED in read_yaml(Path(path), "experiment"):
        return _read_trained(Path(path))
    cli = run_cli(["--config", str(path)], run=False)
    resolved = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    folder = Path(cli.trainer.default_root_dir)
    return Experiment(Path(path), folder, cli.model.lm, cli.datamodule, resolved, cli.parser)


def _read_trained(path: Path) -> Experiment:
    """A finished run, whatever it was trained on, beside the text of the file; the run's folder is only read."""
    parser = Parser(prog="simba-lab")
    parser.add_argument(f"--{TRAINED}", type=str, required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    config = parser.parse_path(str(path))
    settle_seeds(config)
    resolved = yaml.safe_load(parser.dump(config, skip_none=False))
    with blaming_config():
        data = parser.instantiate_classes(config).data
    folder = Path(resolved[TRAINED])
    _check_finished(folder, path)
    if isinstance(data, TextData):
        _check_tokenizer(data, folder, path)
    return Experiment(path, folder, load(folder), data, resolved, parser)


def _check_finished(folder: Path, path: Path) -> None:
    """A run must have ended; a folder that was converted from another format has no record of it."""
    if not folder.is_dir():
        raise InputError(f"{path}: {TRAINED}: no folder {folder}; name that of a finished run")
    record = folder / RUN_FILE
    if record.is_file() and read_yaml(record, TRAINED).get("status") != "done":
        raise InputError(f"{path}: {TRAINED}: the run in {folder} is not finished; train it to its end first")


def _check_tokenizer(data: TextData, folder: Path, path: Path) -> None:
    """Token ids must mean to the data what they mean to the run."""
    given, own = Path(data.settings.tokenizer), folder / TOKENIZER_FILE
    if own.is_file() and not (given.is_file() and same_tokens(given, own)):
        raise InputError(f"{path}: data.tokenizer: {given} is not what {folder} was trained with; give {own}")


def same_tokens(given: Path, own: Path) -> bool:
    """Whether two tokenizer files encode every text alike, however they are written."""
    return Tokenizer.load(given).fingerprint() == Tokenizer.load(own).fingerprint()


def _completed(saved: dict[str, Any], wanted: dict[str, Any], parser: Parser) -> dict[str, Any]:
    """``saved`` with the default of every key that ``wanted`` has and it has not.

    What the defaults are, the parser says of ``wanted`` without those keys; where it cannot do without them, none is.
    """
    known = _without_missing(wanted, saved)
    if known == wanted:
        return saved
    try:
        config = parser.parse_object(known)
    except InputError:
        return saved
    settle_seeds(config)
    defaults = yaml.safe_load(parser.dump(config, skip_none=False))
    return _filled(saved, defaults)


def _without_missing(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``values`` without the keys, at any depth, that ``other`` lacks."""
    return {key: _inside(_without_missing, value, other[key]) for key, value in values.items() if key in other}


def _filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """``values`` with those keys of ``defaults``, at any depth, that it lacks."""
    return defaults | {key: _inside(_filled, value, defaults.get(key)) for key, value in values.items()}


def _inside(change: Callable[[dict, dict], dict], value: Any, other: Any) -> Any:
    return change(value, other) if isinstance(value, dict) and isinstance(other, dict) else value


def _difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Dotted name of the first setting of model or data, or of the number of steps, in which two configs differ."""
    for section in ("seed_everything", "model", "data"):
        differing = _first_difference(section, saved.get(section), wanted.get(section))
        if differing:
            return differing
    trainers = [config.get("trainer") for config in (saved, wanted)]
    steps = [trainer.get("max_steps") if isinstance(trainer, dict) else trainer for trainer in trainers]
    return None if steps[0] == steps[1] else "trainer.max_steps"


def _first_difference(path: str, saved: Any, wanted: Any) -> str | None:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*saved, *(key for key in wanted if key not in saved)]:
            differing = _first_difference(f"{path}.{key}", saved.get(key), wanted.get(key))
            if differing:
                return differing
        return None
    return None if saved == wanted else path
