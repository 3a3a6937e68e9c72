"""What the requests of a run cost, by the closed form: the same number whatever was batched, shared or known before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simba_lab.evaluate.benchmarks.cost import cost_of_pairs, kept_by_layer
from simba_lab.evaluate.benchmarks.scores import Cost
from simba_lab.evaluate.scoring import Pair
from simba_lab.model import LanguageModel


class Account:
    """Costs of one arm by kind of request."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._costs: dict[str, Cost] = {}

    def score(self, kind: str, pairs: Sequence[Pair], requests: int) -> None:
        """Charge pairs that ``requests`` requests consist of."""
        self._add(kind, cost_of_pairs(self._model, pairs, requests))

    def generate(self, kind: str, contexts: Sequence[np.ndarray], flops: int) -> None:
        """Charge prompts by what was executed: how long their texts get is known only afterwards."""
        lengths = [len(context) for context in contexts]
        self._add(kind, Cost(flops, len(contexts), len(contexts), kept_by_layer(self._model, lengths)))

    def _add(self, kind: str, cost: Cost) -> None:
        if cost.requests:
            self._costs[kind] = _sum(self._costs[kind], cost) if kind in self._costs else cost

    def as_record(self) -> dict[str, Any]:
        """Plain data: by kind of request the FLOPs, and the mean tokens of a context that entered each layer."""
        return {
            kind: {
                "requests": cost.requests,
                "contexts": cost.contexts,
                "flops": cost.flops,
                "flops_per_request": cost.per_request,
                "kept_by_layer": cost.kept,
            }
            for kind, cost in self._costs.items()
        }


def _sum(one: Cost, other: Cost) -> Cost:
    contexts = one.contexts + other.contexts
    kept = np.zeros(len(one.kept or other.kept))
    for cost in (one, other):
        kept += np.array(cost.kept or 0.0) * cost.contexts / max(contexts, 1)
    return Cost(one.flops + other.flops, one.requests + other.requests, contexts, kept.tolist())
