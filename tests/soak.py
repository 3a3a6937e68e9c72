"""What the parts of a soak counted, for the lines at its end (`make soak`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

PARTS = pytest.StashKey[dict[str, Any]]()
Counted = Callable[[str, Any], None]
"""Adds to the count of a part: kills by what was killed, or a ``fuzzing.Tally``."""


def counting(config: pytest.Config) -> Counted:
    parts = config.stash.setdefault(PARTS, {})

    def counted(part: str, count: Any) -> None:
        parts[part] = parts[part] + count if part in parts else count

    return counted


def summary(config: pytest.Config) -> list[str]:
    """One line for each part that ran; none of an ordinary test run."""
    return [f"{part}: {_told(count)}" for part, count in config.stash.get(PARTS, {}).items()]


def _told(count: Any) -> str:
    if not isinstance(count, Counter):
        return str(count)
    kinds = ", ".join(f"{number} of {kind}" for kind, number in sorted(count.items()))
    return f"{count.total()} kills: {kinds}"
