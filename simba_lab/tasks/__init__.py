"""The tasks room: the evaluation harness's tasks without a network, as files that it reads."""

from __future__ import annotations

from simba_lab.tasks.benchmarks import PAPER6, Benchmark, find_benchmark, in_width, stock_name
from simba_lab.tasks.heldout import CONTINUATION, PERPLEXITY, build_heldout
from simba_lab.tasks.long_context import LONG_CONTEXT, build_long_context
from simba_lab.tasks.offline import (
    DEFAULT_FOLDER,
    built_tasks,
    documents_of,
    ensure_paper6,
    even_samples,
    offline_manager,
    offline_twin,
)
from simba_lab.tasks.recall import MQAR, NEEDLE, build_recall

__all__ = [
    "CONTINUATION",
    "DEFAULT_FOLDER",
    "LONG_CONTEXT",
    "MQAR",
    "NEEDLE",
    "PAPER6",
    "PERPLEXITY",
    "Benchmark",
    "build_heldout",
    "build_long_context",
    "build_recall",
    "built_tasks",
    "documents_of",
    "ensure_paper6",
    "even_samples",
    "find_benchmark",
    "in_width",
    "offline_manager",
    "offline_twin",
    "stock_name",
]
