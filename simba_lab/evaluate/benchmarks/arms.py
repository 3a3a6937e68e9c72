"""Arms of one model over tasks of the harness: the weights are shared, what is finished is not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from simba_lab.checkpoint import model_spec
from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.arms import parse_arm
from simba_lab.evaluate.benchmarks.run import BenchmarkArm, PreparedTask
from simba_lab.evaluate.benchmarks.scores import SHARE, TaskScores
from simba_lab.evaluate.benchmarks.store import ArmScores, ScoreStore
from simba_lab.model import LanguageModel

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Say = Callable[[str], None]


def read_arms(
    names: Sequence[str], model: LanguageModel, tokenizer: Tokenizer, batch_size: int, answers: str | None = None
) -> list[BenchmarkArm]:
    """The arms of ``dense`` and ``schedule:criterion@mean_keep``, over the same weights in memory.

    ``answers`` is a folder in which the answers of a task that is not finished are kept.
    Raises InputError for a name that is unknown or given twice.
    """
    from simba_lab.evaluate.harness import SimbaLabLM

    arms: list[BenchmarkArm] = []
    for name in names:
        if name in [arm.name for arm in arms]:
            raise InputError(f"--arms: {name} is given twice")
        weights = arms[0].lm.weights_hash if arms else None
        lm = SimbaLabLM.from_model(
            parse_arm(name, model), tokenizer, batch_size=batch_size, answers=answers, weights=weights
        )
        arms.append(BenchmarkArm(name, lm, tokenizer))
    return arms


def evaluate_tasks(
    arms: Sequence[BenchmarkArm], tasks: Mapping[str, Task], limit: int | None, store: ScoreStore, say: Say
) -> dict[str, ArmScores]:
    """Every arm on every task, over ``limit`` evenly spread documents of each (None: all of them).

    Each result goes to ``store`` as soon as it is known, and is taken from there if it was.
    """
    prepared = [PreparedTask(name, task, limit) for name, task in tasks.items()]
    jobs = [(arm, task) for arm in arms for task in prepared]
    found = {arm.name: ArmScores(arm.name, _details(arm), {}) for arm in arms}
    stored = {(arm.name, task.name): store.load(arm.name, task.name, arm.fingerprint(task)) for arm, task in jobs}
    open_jobs = [(arm, task) for arm, task in jobs if stored[arm.name, task.name] is None]
    progress = _Progress([arm.cost(task).flops for arm, task in open_jobs], say)
    if len(open_jobs) < len(jobs):
        say(f"{len(jobs) - len(open_jobs)} of {len(jobs)} results (arm x task) were measured before")
    for arm, task in open_jobs:
        scores = arm.run(task)
        store.save(arm.name, arm.fingerprint(task), scores)
        stored[arm.name, task.name] = scores
        progress.finish(arm.name, scores)
    for arm, task in jobs:
        found[arm.name].tasks[task.name] = stored[arm.name, task.name]
    return found


def _details(arm: BenchmarkArm) -> dict[str, object]:
    spec = model_spec(arm.lm.model)
    return {
        "pruning": spec["pruning"],
        "weights_hash": arm.lm.weights_hash,
        "fingerprint": arm.lm.fingerprint,
        "protocol": "suffix",
        "max_length": arm.lm.max_length,
        "n_suffix": arm.lm.n_suffix,
        "backend": arm.lm.model.backend.name,
    }


class _Progress:
    """A line for every result, with the time left by the FLOPs left."""

    def __init__(self, flops: Sequence[int], say: Say) -> None:
        self._left = list(flops)
        self._of, self._total, self._say = len(flops), max(1, sum(flops)), say
        self._started = time.monotonic()

    def finish(self, arm: str, scores: TaskScores) -> None:
        self._left.pop(0)
        done = 1 - sum(self._left) / self._total
        left = round((time.monotonic() - self._started) * (1 - done) / max(done, 1e-9))
        count = self._of - len(self._left)
        self._say(
            f"[{count}/{self._of}] {arm}  {scores.task}: {_value(scores)} on {len(scores.doc_id)} of "
            f"{scores.available} documents, {scores.seconds:.1f} s  ({left // 60}:{left % 60:02d} left)"
        )


def _value(scores: TaskScores) -> str:
    metric = scores.metrics[scores.main]
    shown = f"{metric.mean:.1%}" if metric.kind == SHARE else f"{metric.shown(metric.mean):.4g}"
    return f"{scores.main} {shown}"
