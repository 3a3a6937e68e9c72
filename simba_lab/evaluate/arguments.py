"""Model arguments of the harness: plain scalars -> an arm, a device, a batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, SCHEDULES, PruningPlan
from simba_lab.registry import Spec
from simba_lab.training import CONFIG_FILE
from simba_lab.training.mistakes import read_yaml

DEFAULT_BATCH = 8
DEFAULT_LENGTH = 2048
DEFAULT_SUFFIX = 64
ARGUMENTS = (
    "checkpoint", "criterion", "schedule", "mean_keep", "protect_recent", "convolution", "dense", "batch_size",
    "max_batch_size", "device", "backend", "max_length", "n_suffix", "answers",
)  # fmt: skip
AUTO = "auto"
HARNESS_DEVICE = "cuda:0"
"""What the harness passes on when nobody named a device."""


def pruning_plan(
    model: LanguageModel,
    criterion: Spec | None,
    schedule: Spec | None,
    mean_keep: float | None,
    protect_recent: float | None,
    convolution: str | None,
    dense: bool,
    options: dict[str, Any],
) -> PruningPlan | None:
    """The plan asked for; what is not given is as the model was saved. ``options`` go to whoever knows their name.

    Raises InputError for an option that nobody knows, naming all there are.
    """
    saved = model.pruning
    asked = options or any(value is not None for value in (criterion, schedule, mean_keep, protect_recent, convolution))
    if dense and asked:
        raise InputError("model_args: dense=True prunes nothing; leave out criterion, schedule and their options")
    if not asked:
        return None if dense else saved
    criterion = criterion or (CRITERIA.spec(saved.criterion) if saved else "global_impact")
    schedule = schedule or (SCHEDULES.spec(saved.schedule) if saved else "linear")
    protect_recent = protect_recent if protect_recent is not None else (saved.protect_recent if saved else 0.0)
    of_schedule, of_criterion = _split_options(schedule, criterion, options)
    name, init_args = CRITERIA.parse(criterion)
    return PruningPlan.build(
        model.config.n_layer,
        {"class_path": name, "init_args": init_args | of_criterion},
        schedule,
        _number("mean_keep", mean_keep),
        _number("protect_recent", protect_recent),
        convolution or (saved.convolution if saved else "compacted"),
        **of_schedule,
    )


def _split_options(schedule: Spec, criterion: Spec, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    known = {}
    for registry, spec in ((SCHEDULES, schedule), (CRITERIA, criterion)):
        name, _ = registry.parse(spec)
        known[f"{registry.kind} {name}"] = registry.arguments(registry.resolve(name))
    of_schedule, of_criterion = known.values()
    for key in options:
        if key not in of_schedule and key not in of_criterion:
            theirs = "".join(f"; {owner}: {', '.join(names) or 'no options'}" for owner, names in known.items())
            raise InputError(f"model_args: unknown {key!r}; use {', '.join(ARGUMENTS)}{theirs}")
    first = {key: value for key, value in options.items() if key in of_schedule}
    return first, {key: value for key, value in options.items() if key not in first}


def _number(key: str, value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise InputError(f"model_args: {key} must be a number, got {value!r}")
    return value


def read_whole(key: str, value: Any, at_least: int) -> int:
    """An integer of at least ``at_least``, or InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"model_args: {key} must be an integer of at least {at_least}, got {value!r}")
    return value


def read_batch_size(batch_size: int | str, most: int | None) -> int:
    """The harness's batch size: a number, or ``auto`` or ``auto:N``, which choose 8; never above ``most``."""
    text = str(batch_size)
    if text.partition(":")[0] == "auto":
        size = DEFAULT_BATCH
    elif text.isdecimal() and int(text) > 0:
        size = int(text)
    else:
        raise InputError(f"batch_size must be an integer of at least 1, or auto, got {batch_size!r}")
    return size if most is None else min(size, read_whole("max_batch_size", most, at_least=1))


def read_device(name: str | None, unasked: str | None = None) -> torch.device:
    """The device of a name; None, ``auto`` and ``unasked``, a default of the caller's, take CUDA where there is one.

    Raises InputError for no device of torch, and for a CUDA asked by name that is not here.
    """
    usable = torch.cuda.is_available()
    if name in (None, AUTO, unasked):
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: {name!r} is no device of torch; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not usable:
        raise InputError(f"device: torch {torch.__version__} sees no CUDA device here; use cpu or auto, not {name}")
    return device


def trained_length(checkpoint: Path) -> int | None:
    """Tokens per training sequence, if the experiment file of the run that a checkpoint belongs to says so."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / CONFIG_FILE).is_file():
            config = read_yaml(folder / CONFIG_FILE, "checkpoint")
            try:
                length = config["data"]["init_args"]["length"]
            except (KeyError, TypeError):
                return None
            return length if isinstance(length, int) else None
    return None
