"""Where the time of a pruned training step goes, kernel by kernel, beside the dense step with the same loss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from simba_lab.bench import training
from simba_lab.bench.checks import RedCheck
from simba_lab.bench.machine import describe
from simba_lab.bench.models import check_models
from simba_lab.bench.session import Session
from simba_lab.bench.training import StretchClock, TrainingCase, batches_of, dense_alike, promised_speedup, train_ours
from simba_lab.errors import InputError

EVERY = (1, 4)
"""Layers from one cut of the schedule to the next, of the pruned steps."""


@dataclass(frozen=True)
class KernelTime:
    """Milliseconds of a step in all calls of one kernel, and how many those are, in the dense and the pruned step.

    ``over``: milliseconds above what the promise of FLOPs leaves of the dense step's.
    """

    name: str
    dense: float
    dense_calls: float
    pruned: float
    pruned_calls: float
    over: float


class KernelClock(StretchClock):
    """Times stretches as its base does, and profiles one more that no reading contains."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.milliseconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.more = training.STRETCH
        with self._recording():
            pass  # CUPTI must be there when a CUDA graph is captured, or the graph's kernels are not seen

    def tick(self, loss: Tensor) -> None:
        if self.steps < training.STEPS:
            super().tick(loss)
            if self.steps == training.STEPS:
                self._profiler = self._recording()
                self._profiler.start()
            return
        self.steps += 1
        if self.steps == training.STEPS + self.more:
            loss.detach().cpu()  # waits for everything before it
            self._profiler.stop()
            self._read()

    def _recording(self) -> profile:
        on_gpu = self.device.type == "cuda"
        return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def _read(self) -> None:
        for event in self._profiler.key_averages():
            on_gpu = event.device_type == DeviceType.CUDA
            if on_gpu == (self.device.type == "cuda"):
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                name = short_name(event.key)
                self.milliseconds[name] += microseconds / 1e3 / self.more
                self.calls[name] += event.count / self.more


def profile_training(cases: Sequence[TrainingCase], session: Session) -> dict[str, Any]:
    """The JSON of ``bench train --profile``: for each case and schedule the step times and a row for every kernel.

    Raises InputError if the small model of the check is wrong: nothing is profiled then.
    """
    session.progress("correctness check")
    try:
        checks = check_models(session.device, session.seed, session.backend)
    except RedCheck as error:
        raise InputError(f"bench train: {error}") from None
    found = []
    for case in cases:
        session.progress(case.what)
        found += _profiles(case, session)
    about = {"bench": "train profile", "machine": describe(), "seed": session.seed, "checks": checks}
    return about | {"profiles": found, "exit_code": 0}


def _profiles(case: TrainingCase, session: Session) -> Iterator[dict[str, Any]]:
    batches = batches_of(case, session.seed)
    dense = _profiled(case, batches, session, dense_alike(case))
    for every in EVERY:
        pruning = training.pruned_linearly(case, every, "compacted")
        pruned, promise = _profiled(case, batches, session, pruning), promised_speedup(case, pruning)
        names = sorted({*dense.milliseconds, *pruned.milliseconds})
        rows = [_row(name, dense, pruned, promise) for name in names]
        seldom = "" if every == 1 else f", every {every} layers"
        yield {
            "what": f"{case.what}, pruned linearly to 10% by global impact{seldom}",
            "dense_step": dense.timing().median,
            "pruned_step": pruned.timing().median,
            "promise": promise,
            "kernels": [vars(row) for row in sorted(rows, key=lambda row: -abs(row.over))],
        }


def _profiled(case: TrainingCase, batches: list[dict[str, Tensor]], session: Session, pruning: Any) -> KernelClock:
    clock = KernelClock(session.device)
    train_ours(case, batches, session, pruning, clock=clock)
    return clock


def _row(name: str, dense: KernelClock, pruned: KernelClock, promise: float) -> KernelTime:
    before, after = dense.milliseconds[name], pruned.milliseconds[name]
    return KernelTime(name, before, dense.calls[name], after, pruned.calls[name], after - before / promise)


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces and template arguments."""
    bare = re.sub(r"^void |\(anonymous namespace\)::|at::native::|at::cuda::", "", name)
    return re.split(r"[<(]", bare, maxsplit=1)[0][:60]
