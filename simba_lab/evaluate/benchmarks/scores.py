"""What an arm scored on a task of the evaluation harness, document by document, and how that is written down.

Every metric is a ratio of two sums over documents, of values and of weights (mostly 1), so that whole documents can be
resampled and arms compared in pairs. Perplexities are kept as nats and only shown as their exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simba_lab.tasks.benchmarks import stock_name

FloatArray = NDArray[np.float64]

SHARE, NATS, NUMBER = "share", "nats", "number"
"""Kinds of metric: shares are shown in per cent, nats as a perplexity."""

# What published tables of the six benchmarks show; of any other task it is the first metric.
_MAIN = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "lambada_openai": "acc"}
_SHARES = ("acc", "exact_match", "em")

_Reading = tuple[str, Callable[[Any], tuple[float, float]]]
# Aggregations of the harness by name -> kind, and a document's score as (value, weight).
_READINGS: dict[str, _Reading] = {
    "mean": (NUMBER, lambda score: (float(score), 1.0)),
    "perplexity": (NATS, lambda score: (-float(score), 1.0)),
    "weighted_perplexity": (NATS, lambda score: (-float(score[0]), float(score[1]))),
    "bits_per_byte": (NUMBER, lambda score: (-float(score[0]) / math.log(2), float(score[1]))),
}


@dataclass(frozen=True)
class Metric:
    """One metric over D documents: ``sum(values) / sum(weights)``, both (D,) float64."""

    kind: str
    higher_is_better: bool
    values: FloatArray
    weights: FloatArray

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum())

    def shown(self, mean: float) -> float:
        """A mean in the unit of the metric's name: a perplexity instead of nats."""
        return math.exp(min(mean, 700.0)) if self.kind == NATS else mean


@dataclass(frozen=True)
class Cost:
    """Compute of an arm on a task, by the closed form and without padding.

    Each distinct context is charged once, its continuations after it. ``kept`` are the mean tokens that enter each
    layer over the contexts.
    """

    flops: int
    requests: int
    contexts: int
    kept: list[float] = field(repr=False)

    @property
    def per_request(self) -> float:
        return self.flops / self.requests


@dataclass(frozen=True)
class TaskScores:
    """One arm on one task: D of its ``available`` documents."""

    task: str
    version: str
    available: int
    doc_id: list[int]
    doc_hash: list[str]
    main: str
    metrics: dict[str, Metric]
    cost: Cost
    seconds: float

    @property
    def documents(self) -> list[tuple[int, str]]:
        return list(zip(self.doc_id, self.doc_hash, strict=True))

    def columns(self) -> list[str]:
        """Metrics of the main table: a perplexity, where the task has one beside it, and the main metric."""
        beside = [name for name, metric in self.metrics.items() if metric.kind == NATS and name != self.main][:1]
        return [*beside, self.main]

    def as_record(self) -> dict[str, Any]:
        """Plain data for a result file; :func:`simba_lab.evaluate.benchmarks.records.read_scores` is the inverse."""
        scores = [
            {"doc_id": number, "doc_hash": digest} | {"metrics": self._of_document(place)}
            for place, (number, digest) in enumerate(self.documents)
        ]
        metrics = {
            name: {"kind": metric.kind, "higher_is_better": metric.higher_is_better, "value": metric.shown(metric.mean)}
            for name, metric in self.metrics.items()
        }
        head = {"task": self.task, "version": self.version, "available": self.available, "main": self.main}
        cost = asdict(self.cost) | {"flops_per_request": self.cost.per_request}
        return head | {"metrics": metrics, "cost": cost, "seconds": self.seconds, "documents": scores}

    def _of_document(self, place: int) -> dict[str, list[float]]:
        return {
            name: [float(metric.values[place]), float(metric.weights[place])] for name, metric in self.metrics.items()
        }


def read_metric(name: str, aggregation: str, higher_is_better: bool, scores: Sequence[Any]) -> Metric | None:
    """The harness's scores of all documents on one metric; None if they are not one number for each document."""
    kind, reading = _READINGS.get(aggregation, (NUMBER, None))
    if reading is None or not scores:
        return None
    try:
        pairs = np.array([reading(score) for score in scores], dtype=np.float64)
    except (TypeError, ValueError, IndexError):
        return None
    if aggregation == "mean" and name.startswith(_SHARES):
        kind = SHARE
    return Metric(kind, higher_is_better, pairs[:, 0], pairs[:, 1])


def main_metric(task: str, names: Sequence[str]) -> str:
    """The metric of the main table: the customary one of a known benchmark, else the first."""
    wanted = _MAIN.get(stock_name(task))
    return wanted if wanted in names else names[0]
