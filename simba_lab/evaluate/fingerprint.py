"""Hashes that tell arms apart: two of them may share answers only if everything the answers depend on is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from simba_lab.checkpoint import model_spec
from simba_lab.model import LanguageModel
from simba_lab.pruning import PruningPlan

FORMAT = 2
"""Raise it when the same arm would give other answers than before."""


def arm_hash(model: LanguageModel, weights: str, tokenizer: str, settings: Mapping[str, Any]) -> str:
    """SHA-256 over ``weights`` and ``tokenizer`` (their hashes), shape, pruning, backend and the plain ``settings``."""
    identity = {
        "format": FORMAT,
        "weights": weights,
        "spec": model_spec(model),
        "code": _code_hash(model.pruning),
        "tokenizer": tokenizer,
        "backend": model.backend.name,
        "settings": dict(settings),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def weights_hash(model: LanguageModel) -> str:
    """SHA-256 of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _code_hash(plan: PruningPlan | None) -> str | None:
    """Of the source of criterion and schedule: a user's own may change under the same name."""
    if plan is None:
        return None
    source = _source(type(plan.criterion)) + _source(type(plan.schedule))
    return hashlib.sha256(source.encode()).hexdigest()


def _source(part: type) -> str:
    """Source of the module of a class; of a class without one (made in a session), its name has to do."""
    try:
        return inspect.getsource(sys.modules[part.__module__])
    except (KeyError, OSError, TypeError):
        return part.__qualname__
