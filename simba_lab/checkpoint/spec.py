"""Our own description of a model: plain data that rebuilds the module, weights aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import PruningPlan

SPEC_KEY = "simba_lab_model"
"""Key of the spec in a Lightning checkpoint."""
FORMAT = 1


def model_spec(model: LanguageModel) -> dict[str, Any]:
    """Config and pruning plan of a model as plain data."""
    pruning = None if model.pruning is None else model.pruning.spec()
    return {"format": FORMAT, "model": model.config.to_dict(), "pruning": pruning}


def read_spec(spec: Any, source: str) -> tuple[ModelConfig, PruningPlan | None]:
    """Config and plan of a spec. Raises InputError naming the source and the key that does not fit."""
    if not isinstance(spec, Mapping) or spec.get("format") != FORMAT or not isinstance(spec.get("model"), Mapping):
        raise InputError(f"{source}: not a simba_lab model spec of format {FORMAT}")
    try:
        config = ModelConfig.from_dict(spec["model"])
        return config, None if spec.get("pruning") is None else PruningPlan.from_spec(spec["pruning"])
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: {error}") from None
