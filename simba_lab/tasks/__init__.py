"""The tasks room: the evaluation harness's tasks without a network, as files that it reads."""

from __future__ import annotations

from simba_lab.tasks.benchmarks import PAPER6, Benchmark, find_benchmark
from simba_lab.tasks.offline import (
    DEFAULT_FOLDER,
    documents_of,
    ensure_paper6,
    even_samples,
    offline_manager,
    offline_twin,
)

__all__ = [
    "DEFAULT_FOLDER",
    "PAPER6",
    "Benchmark",
    "documents_of",
    "ensure_paper6",
    "even_samples",
    "find_benchmark",
    "offline_manager",
    "offline_twin",
]
