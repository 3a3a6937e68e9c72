"""Range checks of data settings, with messages that name the key."""

from __future__ import annotations

from simba_lab.errors import InputError


def require_set(**values: float | None) -> None:
    """Raises InputError for the first `data.KEY` that is null; the config parser lets null through everywhere."""
    for key, value in values.items():
        if value is None:
            raise InputError(f"data.{key}: null is no number; give one or leave the key out")


def require_at_least(least: int, **values: int | None) -> None:
    """Raises InputError for the first `data.KEY` below `least`; None passes."""
    for key, value in values.items():
        if value is not None and value < least:
            raise InputError(f"data.{key}: {value} must be at least {least}")


def require_between(low: float, high: float, **values: float) -> None:
    """Raises InputError for the first `data.KEY` outside [low, high)."""
    for key, value in values.items():
        if not low <= value < high:
            raise InputError(f"data.{key}: {value} must lie in [{low}, {high})")
