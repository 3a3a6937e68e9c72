"""Scores read back from a result file, which anybody may have edited: every key is checked before it is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simba_lab.evaluate.benchmarks.scores import Cost, Metric, TaskScores

_LARGEST = 1e30
"""Sums of larger numbers would leave what a float holds."""

_Text = Annotated[str, Field(max_length=300)]
_Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=10**30)]
_Share = Annotated[int, Field(ge=1, le=10**30)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Document(_Strict):
    doc_id: int
    doc_hash: _Text
    metrics: dict[_Text, Annotated[list[_Number | None], Field(min_length=2, max_length=2)]]


class _Metric(_Strict):
    kind: Literal["share", "nats", "number"]
    higher_is_better: bool


class _Cost(_Strict):
    flops: _Count
    requests: _Share
    contexts: _Count
    kept: list[_Number]


class _Task(_Strict):
    task: _Text
    version: _Text
    available: _Count
    main: _Text
    metrics: dict[_Text, _Metric]
    cost: _Cost
    seconds: _Number
    documents: Annotated[list[_Document], Field(min_length=1)]


class _Arm(_Strict):
    model_config = ConfigDict(strict=True, extra="allow")

    name: _Text
    flops: _Count
    flops_per_request: _Number
    tasks: Annotated[dict[_Text, Any], Field(min_length=1)]


class _Arms(_Strict):
    arms: Annotated[list[_Arm], Field(min_length=1)]


def read_scores(record: Any) -> TaskScores:
    """What :meth:`TaskScores.as_record` wrote. Raises ValueError naming the key for anything else."""
    task = _checked(_Task, record)
    documents = task.documents
    metrics = {name: _metric(name, about, documents) for name, about in task.metrics.items()}
    if task.main not in metrics:
        raise ValueError(f"main: {task.main!r} is not among its metrics")
    return TaskScores(
        task.task, task.version, task.available, [row.doc_id for row in documents],
        [row.doc_hash for row in documents], task.main, metrics, Cost(**task.cost.model_dump()), task.seconds,
    )  # fmt: skip


def read_record(content: Any) -> list[tuple[str, dict[str, Any], dict[str, TaskScores]]]:
    """(name, details, scores by task) of every arm of a result file. Raises ValueError naming the key."""
    arms = _checked(_Arms, content).arms
    return [
        (arm.name, dict(arm.model_extra or {}), {task: read_scores(scores) for task, scores in arm.tasks.items()})
        for arm in arms
    ]


def _metric(name: str, about: _Metric, documents: list[_Document]) -> Metric:
    if not all(name in row.metrics for row in documents):
        raise ValueError(f"documents: one has no metric {name!r}")
    pairs = np.array([row.metrics[name] for row in documents], dtype=np.float64)
    if not pairs[:, 1].sum() > 0:
        raise ValueError(f"documents: the weights of metric {name!r} must have a sum above 0")
    return Metric(about.kind, about.higher_is_better, pairs[:, 0], pairs[:, 1])


def _checked(shape: type[BaseModel], content: Any) -> Any:
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}"[:300]) from None
