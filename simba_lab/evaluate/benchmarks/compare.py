"""Arms side by side over the same documents: values with intervals, paired differences, what is not separable.

The documents of a task are a sample of it, and every arm answers the same ones. A difference is therefore taken
document by document; its interval is by bootstrap over documents, its p-value by flipping signs, corrected by Holm over
all arms and columns. An average over tasks counts each task the same, so its documents are resampled within each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.scores import NATS, SHARE, FloatArray, Metric, TaskScores
from simba_lab.evaluate.benchmarks.store import ArmScores
from simba_lab.evaluate.conclusion import separable
from simba_lab.evaluate.statistics import Comparison, Interval, holm, mean_interval, paired_comparison

AVERAGE = "average"
VERDICTS = BETTER, WORSE, SAME = "better", "worse", "not separable"
_BATCH = 1000


@dataclass(frozen=True)
class Difference:
    """``arm - reference`` on a column (task and metric, or the average); of perplexities, in nats."""

    arm: str
    reference: str
    task: str
    metric: str
    kind: str
    higher_is_better: bool
    comparison: Comparison

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`."""
        if not separable(self.comparison):
            return SAME
        return BETTER if (self.comparison.difference > 0) == self.higher_is_better else WORSE

    def as_record(self) -> dict[str, Any]:
        record = asdict(self)
        return record | record.pop("comparison") | {"verdict": self.verdict}


def columns(scores: Mapping[str, TaskScores]) -> list[tuple[str, str]]:
    """(task, metric) of the main table."""
    return [(name, metric) for name, task in scores.items() for metric in task.columns()]


def cell(metric: Metric, n_resamples: int = 10_000) -> dict[str, Any]:
    """The value of a metric and its 95 % interval, both as shown.

    Shares of right answers have Wilson's interval, which does not shrink to nothing at none or all right.
    """
    interval = _wilson(metric) if _is_count(metric) else _resampled(metric, n_resamples)
    shown = None if interval is None else [metric.shown(bound) for bound in interval]
    return {"value": metric.shown(metric.mean), "interval": shown, "kind": metric.kind}


def _is_count(metric: Metric) -> bool:
    return metric.kind == SHARE and bool(np.isin(metric.values, (0, 1)).all() and (metric.weights == 1).all())


def _wilson(metric: Metric) -> Interval:
    from scipy.stats import binomtest

    found = binomtest(int(metric.values.sum()), len(metric.values)).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _resampled(metric: Metric, n_resamples: int) -> Interval | None:
    generator = np.random.default_rng(0)
    return mean_interval(metric.values, metric.weights, n_resamples=n_resamples, rng=generator).interval


def averaged(scores: Mapping[str, TaskScores]) -> bool:
    """Whether an average over the tasks means anything: two or more, all with a share as their main metric."""
    return len(scores) > 1 and all(task.metrics[task.main].kind == SHARE for task in scores.values())


def average_cell(scores: Mapping[str, TaskScores], n_resamples: int = 10_000) -> dict[str, Any]:
    """Mean over tasks of the main metric, each task counting the same, with its 95 % interval."""
    values = [task.metrics[task.main].values for task in scores.values()]
    mean = float(np.mean([task.mean() for task in values]))
    return {"value": mean, "interval": _stratified(values, n_resamples), "kind": SHARE}


def _stratified(values: Sequence[FloatArray], n_resamples: int) -> Interval | None:
    """Interval of the mean of the tasks' means; None if some task has a single document."""
    from scipy.stats import bootstrap

    if min(len(task) for task in values) < 2:
        return None
    found = bootstrap(
        tuple(values), _mean_of_means, paired=False, vectorized=True, method="percentile", confidence_level=0.95,
        n_resamples=n_resamples, batch=_BATCH, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean_of_means(*tasks: FloatArray, axis: int) -> FloatArray:
    return np.mean([task.mean(axis=axis) for task in tasks], axis=0)


def compare(pairs: Sequence[tuple[ArmScores, ArmScores]], n_resamples: int = 10_000) -> list[Difference]:
    """Differences of every (arm, reference) on every column, then on the average where there is one.

    p-values are Holm-corrected over all arms and columns; those of the averages over the arms. Raises InputError,
    naming the arms, if two of them were scored on different tasks or documents.
    """
    by_column, averages = [], []
    for arm, reference in pairs:
        check_same_documents(arm, reference)
        by_column += [_difference(arm, reference, *column, n_resamples) for column in columns(reference.tasks)]
        if averaged(reference.tasks):
            averages.append(_average_difference(arm, reference, n_resamples))
    return [*_corrected(by_column), *_corrected(averages)]


def check_same_documents(arm: ArmScores, reference: ArmScores) -> None:
    if list(arm.tasks) != list(reference.tasks):
        raise InputError(
            f"{arm.name} was scored on {', '.join(arm.tasks)}, {reference.name} on {', '.join(reference.tasks)}; "
            "only the same tasks can be compared"
        )
    for name, scores in arm.tasks.items():
        other = reference.tasks[name]
        if scores.documents != other.documents or set(scores.metrics) != set(other.metrics):
            raise InputError(
                f"{arm.name} and {reference.name} were scored on different documents of {name} "
                f"({len(scores.doc_id)} and {len(other.doc_id)} of them); evaluate both with the same --limit"
            )


def _difference(arm: ArmScores, reference: ArmScores, task: str, name: str, n_resamples: int) -> Difference:
    mine, theirs = arm.tasks[task].metrics[name], reference.tasks[task].metrics[name]
    found = paired_comparison(
        mine.values, theirs.values, theirs.weights, n_resamples=n_resamples, rng=np.random.default_rng(0)
    )
    # Nats are a loss, whatever the harness's metric counts as better.
    better = mine.higher_is_better and mine.kind != NATS
    return Difference(arm.name, reference.name, task, name, mine.kind, better, found)


def _average_difference(arm: ArmScores, reference: ArmScores, n_resamples: int) -> Difference:
    """Documents weigh 1 / (documents of their task x tasks), so that the sum is the difference of the averages."""
    mine, theirs = ([scores.metrics[scores.main].values for scores in side.tasks.values()] for side in (arm, reference))
    share = np.concatenate([np.full(len(task), 1 / (len(task) * len(mine))) for task in mine])
    found = paired_comparison(
        np.concatenate(mine) * share, np.concatenate(theirs) * share, share,
        n_resamples=n_resamples, rng=np.random.default_rng(0),
    )  # fmt: skip
    interval = _stratified([one - other for one, other in zip(mine, theirs, strict=True)], n_resamples)
    return Difference(arm.name, reference.name, AVERAGE, AVERAGE, SHARE, True, replace(found, interval=interval))


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    p_values = holm([difference.comparison.p_value for difference in differences])
    return [
        replace(difference, comparison=replace(difference.comparison, p_value=p_value))
        for difference, p_value in zip(differences, p_values, strict=True)
    ]


def file_pairs(
    first: Mapping[str, ArmScores], second: Mapping[str, ArmScores], names: tuple[str, str]
) -> list[tuple[ArmScores, ArmScores]]:
    """(arm, reference) of two result files, each arm named with its file.

    Arms that both files have are paired by name; without any, every arm of the second is set against the first arm of
    the first.
    """
    before = {name: replace(arm, name=f"{names[0]} {name}") for name, arm in first.items()}
    after = {name: replace(arm, name=f"{names[1]} {name}") for name, arm in second.items()}
    shared = [name for name in after if name in before]
    if shared:
        return [(after[name], before[name]) for name in shared]
    return [(arm, next(iter(before.values()))) for arm in after.values()]
