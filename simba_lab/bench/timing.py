"""How long a call takes: medians over repeats, on rotating inputs, by CUDA events or, without a GPU, by the clock."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median, quantiles

import torch

Call = Callable[[], object]
# Calls queued behind one busy wait; few enough that their launches fit the driver's queue of about a thousand.
_QUEUED = 10
_CYCLES_PER_SECOND = 2e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over ``repeats`` calls: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Raises ValueError for fewer than three measurements: no median and spread."""
        if len(milliseconds) < 3:
            raise ValueError(f"{len(milliseconds)} measurements give no median and spread")
        deciles = quantiles(milliseconds, n=10, method="inclusive")
        return cls(median(milliseconds), deciles[0], deciles[-1], len(milliseconds))


def time_calls(calls: Sequence[Call], device: torch.device, repeats: int, queued: bool = True) -> Timing:
    """Time ``repeats`` calls, going round ``calls``, which do the same work on inputs of their own.

    With ``queued`` a busy wait lets the host run ahead of a CUDA device, so that only work on the device is counted:
    right for one kernel. Without it every call starts on an idle device and launch overhead counts: right for what a
    user waits for. Everything is called once before, so that compilation is not counted.
    """
    for call in calls:
        call()
    order = list(islice(cycle(calls), repeats))
    if device.type != "cuda":
        return Timing.of([_clocked(call) for call in order])
    torch.cuda.synchronize(device)
    if not queued:
        return Timing.of([_between_events([call], 0.0)[0] for call in order])
    lead = _seconds_to_queue(calls)
    batches = (order[start : start + _QUEUED] for start in range(0, repeats, _QUEUED))
    return Timing.of([taken for batch in batches for taken in _between_events(batch, lead * len(batch))])


def free_memory() -> None:
    """Give back what earlier measurements held; a trainer and its module hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def inputs_needed(bytes_per_call: int, device: torch.device) -> int:
    """Sets of inputs to rotate so that none is still in the last-level cache when its turn comes: at least 2."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // max(1, bytes_per_call)))


def capture(call: Call) -> Call:
    """``call`` as a CUDA graph: what replays it. It must need no host, and its inputs must stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose and allocate on first use, which cannot be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _seconds_to_queue(calls: Sequence[Call]) -> float:
    """Host seconds until a call has been queued, the slowest of them."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return max(seconds)


def _between_events(calls: Sequence[Call], lead: float) -> list[float]:
    """Milliseconds of each call on the device, the host having ``lead`` seconds and half as much again to queue."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    if lead:
        torch.cuda._sleep(int(1.5 * lead * _CYCLES_PER_SECOND))
    for call, (start, end) in zip(calls, events, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
