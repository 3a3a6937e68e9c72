"""What every test gets: a fixed seed, a fair share of the cores, and fixtures that several rooms need."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from soak import Counted, counting, summary

settings.register_profile("same-examples-every-run", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("same-examples-every-run")


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist the workers share the cores; without a CUDA device Triton's kernels run in its interpreter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    torch.set_num_threads(threads)
    # Commands that tests start: libraries may split sums by threads, and equal bits are promised for equally many.
    os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What a soak counted stands at its end, part by part."""
    if lines := summary(config):
        terminalreporter.section("soak")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Counted:
    return counting(request.config)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh floating-point memory holds NaN, so that an element which is read before it is written shows up."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, _poisoned_array(getattr(np, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def with_nan(*args: Any, **options: Any) -> torch.Tensor:
        memory = allocate(*args, **options)
        if memory.is_floating_point() or memory.is_complex():
            with torch.no_grad():
                memory.fill_(float("nan"))
        return memory

    return with_nan


def _poisoned_array(allocate: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def with_nan(*args: Any, **options: Any) -> np.ndarray:
        memory = allocate(*args, **options)
        if memory.dtype.kind in "fc":
            memory.fill(np.nan)
        return memory

    return with_nan
