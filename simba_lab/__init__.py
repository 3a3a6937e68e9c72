"""Which tokens may a state-space model drop, and how many at each depth, at exactly equal compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simba_lab.checkpoint import load
    from simba_lab.model import LanguageModel, ModelConfig
    from simba_lab.pruning import Criterion, KeepSchedule, Signals

_HOME = {
    "Criterion": "simba_lab.pruning",
    "KeepSchedule": "simba_lab.pruning",
    "LanguageModel": "simba_lab.model",
    "ModelConfig": "simba_lab.model",
    "Signals": "simba_lab.pruning",
    "load": "simba_lab.checkpoint",
}

__all__ = ["Criterion", "KeepSchedule", "LanguageModel", "ModelConfig", "Signals", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: ``import simba_lab`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'simba_lab' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
