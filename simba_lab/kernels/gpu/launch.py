"""How many programs of what size the scan is started with: fixed rules of the shapes, so that runs repeat exactly.

Measured on an H200 with 16 states: blocks of eight channels in one warp beat wider ones forward and backward, because
nothing then waits at a barrier; six stages of prefetch hide the latency that one warp to a scheduler leaves open.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BLOCK = 8
"""Channels of a program of one warp."""
STAGES = 6
"""Tiles of eight steps on their way while one is computed."""
BACKWARD_STAGES = 3
_MAX_SEGMENTS = 8
_ROUNDS = 4
"""From so many programs to a scheduler on, an uneven last round no longer shows."""


def on_gpu(t: Tensor) -> bool:
    """False for Triton's interpreter, which runs the kernels on CPU tensors and knows no PTX."""
    return t.is_cuda


@cache
def _schedulers(device: torch.device) -> int:
    """Warp schedulers: four to a multiprocessor. One warp of the scan keeps its scheduler nearly busy."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_split(programs: int, windows: int, device: torch.device) -> tuple[int, int]:
    """Programs that do whole sequences, and segments into which the sequences of the others are cut.

    The others are those of the last, partly filled round, in which most schedulers would idle.
    """
    schedulers = _schedulers(device)
    rounds, others = divmod(programs, schedulers)
    segments = 1 if rounds >= _ROUNDS or not others else min(schedulers // others, windows)
    return (programs, 1) if segments < 2 else (programs - others, segments)


def segments(programs: int, windows: int, device: torch.device) -> int:
    """Parts of a sequence of ``windows`` windows whose backward passes run side by side.

    Two programs fit a scheduler, for their registers. Of all cuts the one whose last round is fullest; a cut costs a
    pass over the whole sequence for the gradients at its ends, about 15 % of the time.
    """
    resident = 2 * _schedulers(device)
    choices = range(1, min(_MAX_SEGMENTS, windows) + 1)
    return min(choices, key=lambda parts: -(-programs * parts // resident) / parts * (1 if parts == 1 else 1.15))


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_by_side(first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
    """Both, on two streams of a CUDA device, joined before anything that follows; one after the other elsewhere."""
    if device.type != "cuda":
        first(), second()
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        first()
    second()
    current.wait_stream(side)
