"""What is wrong with an experiment file, in one line that names the key and what would be right.

The config parser reports a mistake as pages of types that also did not fit; here its message is read and shortened.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from simba_lab.checkpoint import load
from simba_lab.errors import InputError

UNKNOWN_OPTION = re.compile(r"(?:does not accept option|^Option) '([^']+)'")
UNKNOWN_ARGUMENT = re.compile(r"^unrecognized arguments: --([^ =]+)")
MOST_VALUES = 100_000
"""In a YAML file, its aliases written out: a few lines of them can stand for billions."""
NOT_KEYS = ("help", "config", "print_config", "print_shtab")


def shortened(message: str, parser: argparse.ArgumentParser) -> str:
    """One line for a message of ``parser``: unknown keys with those there are, wrong values with what was expected."""
    unknown = UNKNOWN_OPTION.search(message) or UNKNOWN_ARGUMENT.search(message)
    if unknown:
        return _unknown_key(unknown[1], _keys(parser))
    key = re.match(r'Parser key "([^"]+)":', message)
    if key is None:
        return " ".join(message.split())
    given = re.search(r"Given value: (\{.*\})", message)
    if given and "a dict with class_path entry" in message:
        return f"{key[1]}: expected the keys class_path and init_args, got {_keys_of(given[1])}"
    reasons = [reason for reason in _reasons(message) if "NoneType" not in reason]
    return f"{key[1]}: {'; '.join(dict.fromkeys(reasons)) or ' '.join(message[key.end() :].split())}"


def _unknown_key(key: str, known: Iterable[str]) -> str:
    parent = key.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    here = sorted({name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)})
    near = difflib.get_close_matches(key.removeprefix(prefix), here, n=1)
    hint = f" (did you mean {prefix}{near[0]}?)" if near else ""
    return f"{key} is not a key{hint}; keys here: {', '.join(here) or 'none'}"


def _keys(parser: argparse.ArgumentParser) -> set[str]:
    """Dotted names of all settings, those of the subcommands included."""
    names: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names.update(*(_keys(inner) for inner in action.choices.values()))
        elif action.dest.rpartition(".")[2] not in NOT_KEYS:
            names.add(action.dest)
    return names


def _keys_of(text: str) -> str:
    try:
        return ", ".join(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError):
        return text


def _reasons(message: str) -> list[str]:
    """The items of the message's list, each with the line that follows its colon."""
    reasons: list[str] = []
    for line in (line.strip() for line in message.splitlines()):
        if line.startswith("- "):
            reasons.append(line[2:])
        elif reasons and reasons[-1].endswith(":"):
            reasons[-1] += f" {line}"
    return reasons


def check_config_files(arguments: Sequence[str]) -> None:
    """Raises InputError naming a ``--config`` file that is missing or not YAML."""
    following = dict(zip(arguments, arguments[1:], strict=False))
    paths = [following[flag] for flag in ("--config", "-c") if flag in following]
    paths += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    for path in map(Path, paths):
        read_yaml(path, "--config")


def read_yaml(path: Path, called: str) -> dict[str, Any]:
    """Keys and values of a YAML file. Raises InputError, naming the file, if it is missing or holds something else."""
    if not path.is_file():
        near = ", ".join(sorted(found.name for found in path.parent.glob("*.yaml"))) or "no .yaml file"
        raise InputError(f"{called}: {path} does not exist; its folder holds {near}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _expanded(values, {})
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from None
    if size > MOST_VALUES:
        raise InputError(f"{path}: its aliases stand for more than {MOST_VALUES:,} values; write out what is meant")
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, got {type(values).__name__}")
    return values


def _expanded(value: Any, known: dict[int, float]) -> float:
    """How many values there are if every alias is written out; infinite for one that holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known) for item in inner)
    return known[id(value)]


@contextmanager
def blaming_config() -> Iterator[None]:
    """What building the parts of an experiment raises is about a value of its config: InputError, with the reason."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError, MisconfigurationException, MemoryError) as error:
        raise _of_config(error) from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise _of_config(error) from error


def _of_config(error: Exception) -> InputError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    reason = " ".join(str(error).split())[:300]
    return cause or InputError(f"config: its parts cannot be built: {type(error).__name__}: {reason}")


def check_checkpoint(ckpt_path: str | None, folder: Path, subcommand: str) -> None:
    """Raises InputError for a ``ckpt_path`` that is missing, truncated, not ours or would execute code.

    ``last`` is the newest checkpoint of the run folder; only ``fit`` may go without, and then begins at the beginning.
    """
    path = folder / "checkpoints" / "last.ckpt" if ckpt_path == "last" else ckpt_path
    if path is None or (ckpt_path == "last" and subcommand == "fit" and not path.is_file()):
        return
    if not Path(path).is_file():
        raise InputError(f"ckpt_path: {path} does not exist; give a .ckpt file, or last for the run folder's newest")
    load(path)
