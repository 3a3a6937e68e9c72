"""A place in a model's depth, told as a share of it or as a layer."""

from __future__ import annotations

from simba_lab.errors import InputError


def checked_depth(owner: str, key: str, value: float) -> float:
    """``value``, a share in (0, 1) or a layer index of 1 or more; raises InputError for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (value >= 1 and float(value).is_integer())):
        raise InputError(f"{owner}: {key} must be a share in (0, 1) or a layer index of 1 or more, got {value!r}")
    return value


def layer_at(depth: float, n_layers: int) -> int:
    """The layer, 1 or above, that a checked depth names in a model of ``n_layers``, which may have fewer."""
    return max(1, round(depth * n_layers)) if depth < 1 else int(depth)
