"""One arm on one task of the evaluation harness: which documents, what identifies the outcome, and running it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.cost import cost_of_pairs, cost_of_texts, per_suffix_token
from simba_lab.evaluate.benchmarks.scores import Cost, Metric, TaskScores, main_metric, read_metric
from simba_lab.evaluate.scoring import Pair, encode_pairs, rolling_pairs
from simba_lab.tasks import even_samples

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from simba_lab.evaluate.harness import SimbaLabLM

FORMAT = 1
"""Raise it when the same requests would be scored, counted or written down otherwise than before."""
LIKELIHOOD, GENERATION = "loglikelihood", "generate_until"


class PreparedTask:
    """A task of the harness with the documents to be scored.

    ``digest`` is of everything the harness asks and how it judges; ``available`` counts all documents of the task.
    """

    def __init__(self, name: str, task: Task, limit: int | None) -> None:
        """Takes ``limit`` evenly spread documents, None for all. Raises InputError for a task without any."""
        self.name, self.task, self.version = name, task, str(task.VERSION)
        self.available = len(task.eval_docs)
        if not self.available:
            raise InputError(f"--tasks: {name} has no documents")
        self.chosen = even_samples({name: self.available}, limit or self.available)[name]
        with without_bars():
            task.build_all_requests(samples=self.chosen, rank=0, world_size=1)
        self.requests = [(request.request_type, request.args) for request in task.instances]
        self.digest = _digest(task)

    def generates(self) -> bool:
        """Whether texts are written, whose lengths, and so their cost, are known only afterwards."""
        return any(kind == GENERATION for kind, _ in self.requests)


def _digest(task: Task) -> str:
    """Every request and document, the metrics with their functions' source, and the harness's version."""
    config = task.config.to_dict()
    judged = {key: config.get(key) for key in ("metric_list", "process_results", "filter_list", "output_type")}
    total = hashlib.sha256(_json([FORMAT, importlib.metadata.version("lm_eval"), str(task.VERSION), judged]))
    for request in task.instances:
        total.update(_json([request.request_type, request.args, request.doc, request.repeats]))
    return total.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


@dataclass(frozen=True)
class BenchmarkArm:
    """An arm as a model of the harness, with its tokenizer."""

    name: str
    lm: SimbaLabLM
    tokenizer: Tokenizer

    def fingerprint(self, prepared: PreparedTask) -> str:
        """SHA-256 of the arm (weights, plan, tokenizer, settings) and of what it is asked."""
        return hashlib.sha256(f"{self.lm.fingerprint} {prepared.digest}".encode()).hexdigest()

    @functools.lru_cache(maxsize=64)  # noqa: B019  # arms live as long as the command
    def cost(self, prepared: PreparedTask) -> Cost:
        """By the closed form; of generation the prompts alone, for how long the texts get is not known yet."""
        texts = [args[0] for _, args in prepared.requests]
        if prepared.generates():
            lengths = [min(len(ids) or 1, self.lm.max_length) for ids in self.tokenizer.encode_batch(texts)]
            return cost_of_texts(self.lm.model, lengths)
        if prepared.requests[0][0] == LIKELIHOOD:
            pairs = encode_pairs(self.tokenizer, [args for _, args in prepared.requests])
            return cost_of_pairs(self.lm.model, [pair.shortened(self.lm.max_length) for pair in pairs], len(pairs))
        pairs = [pair for ids in self.tokenizer.encode_batch(texts) for pair in self._blocks(ids)]
        return cost_of_pairs(self.lm.model, pairs, len(texts))

    def _blocks(self, tokens: list[int]) -> list[Pair]:
        dense = self.lm.model.pruning is None
        return rolling_pairs(tokens, self.tokenizer.eot_id, self.lm.max_length, self.lm.n_suffix, dense)

    def _cost_of_outcome(self, prepared: PreparedTask, rows: list[dict[str, Any]]) -> Cost:
        """With the texts written, by the tokens that they encode to."""
        cost = self.cost(prepared)
        if not prepared.generates():
            return cost
        written = self.tokenizer.encode_batch([text for row in rows for texts in row["resps"] for text in texts])
        fed = sum(len(ids) for ids in written) * per_suffix_token(self.lm.model)
        return replace(cost, flops=cost.flops + fed)

    def run(self, prepared: PreparedTask) -> TaskScores:
        """Score the documents as the harness does.

        Only its function that scores is called: its entry point also asks pip, the compiler and the driver for their
        versions, seconds for every arm and task.

        Raises InputError for a task none of whose metrics is a ratio of sums over documents.
        """
        from lm_eval.evaluator import evaluate

        name, started = prepared.name, time.perf_counter()
        tasks = {"tasks": {name: prepared.task}, "groups": {}}
        with without_bars(unless=sys.stderr.isatty()):
            found = evaluate(self.lm, tasks, samples={name: prepared.chosen}, bootstrap_iters=0)
        seconds = time.perf_counter() - started
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
        metrics = _metrics(prepared.task, found["results"][name], rows)
        if not metrics:
            raise InputError(f"--tasks: no metric of {name} is a mean over documents, so arms cannot be compared on it")
        return TaskScores(
            name, prepared.version, prepared.available, [row["doc_id"] for row in rows],
            [row["doc_hash"] for row in rows], main_metric(name, list(metrics)), metrics,
            self._cost_of_outcome(prepared, rows), seconds,
        )  # fmt: skip


def _metrics(task: Task, totals: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Metric]:
    """The metrics whose value over all documents, computed from the documents' own, is the harness's."""
    metrics = {}
    for name in rows[0]["metrics"]:
        aggregation = getattr(task.aggregation().get(name), "__name__", "")
        better = task.higher_is_better().get(name) is not False
        metric = read_metric(name, aggregation, better, [row[name] for row in rows])
        value = totals.get(f"{name},{rows[0]['filter']}")
        if metric is not None and value is not None and math.isclose(metric.shown(metric.mean), value, rel_tol=1e-6):
            metrics[name] = metric
    return metrics


@contextlib.contextmanager
def without_bars(unless: bool = False) -> Iterator[None]:
    """Standard error without progress bars, which fill a log with half lines; warnings follow at the end."""
    if unless:
        yield
        return
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            yield
    finally:
        lines = written.getvalue().split("\n")
        sys.stderr.writelines(f"{line}\n" for line in lines if line.strip() and not line.startswith("\r"))
