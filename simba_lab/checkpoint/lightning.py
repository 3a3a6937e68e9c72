"""Lightning checkpoints that `simba-lab fit` wrote: a .ckpt that carries our spec beside the weights."""

from __future__ import annotations

from pathlib import Path

from simba_lab.checkpoint.assembly import Stored
from simba_lab.checkpoint.spec import SPEC_KEY, read_spec
from simba_lab.checkpoint.weights import WEIGHTS_FILES, is_weights, read_pickle
from simba_lab.errors import InputError

PREFIX = "lm."
"""Of our model's weights among those of the Lightning module."""


def read_lightning(path: Path) -> Stored:
    """Raises InputError for a file that is truncated, not ours, or would execute code."""
    if path.name in WEIGHTS_FILES:
        raise InputError(f"checkpoint: {path} holds weights alone; give its folder, {path.parent}")
    checkpoint = read_pickle(path)
    if not isinstance(checkpoint, dict) or SPEC_KEY not in checkpoint or not is_weights(checkpoint.get("state_dict")):
        raise InputError(f"checkpoint: {path} was not written by simba_lab: it has no {SPEC_KEY} with weights")
    weights = {key.removeprefix(PREFIX): value for key, value in checkpoint["state_dict"].items()}
    config, plan = read_spec(checkpoint[SPEC_KEY], str(path))
    return Stored(str(path), config, weights, plan, lambda name: PREFIX + name)
