"""How kernels are started: operands they can read, and for the scan how many programs of what size.

Fixed rules of the shapes, so that runs repeat exactly. Measured on an H200 with 16 states: one warp to a program, so
that nothing waits at a barrier. Sixteen channels to a program where there are enough programs to keep every scheduler
busy (0.68 ms against 0.87 at 8 x 2048 x 5120), eight where there are not (1.27 against 1.50 at 1 x 16384 x 5120, 0.286
against 0.306 at 8 x 2048 x 1536); the backward pass holds too much for sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BLOCK = 8
"""Channels of a program of the backward pass."""
BACKWARD_STAGES = 3
"""Tiles of eight steps on their way, that one included which is being computed."""
STEP_WARPS = 4
"""Warps of a program of a single step."""
_MAX_SEGMENTS = 8
_ROUNDS = 4
"""From so many programs to a scheduler on, an uneven last round no longer shows."""


def last_contiguous(t: Tensor) -> Tensor:
    """``t`` with contiguous channels, as every kernel reads it; a copy only where strides demand it."""
    return t if t.stride(-1) == 1 else t.contiguous()


def on_gpu(t: Tensor) -> bool:
    """False for Triton's interpreter, which runs the kernels on CPU tensors and knows no PTX."""
    return t.is_cuda


def step_block(states: int) -> int:
    """Channels of a program of a single step: as many as give each of its threads 16 bytes of state."""
    return max(1, 4 * 32 * STEP_WARPS // states)


@cache
def _schedulers(device: torch.device) -> int:
    """Warp schedulers: four to a multiprocessor. One warp of the scan keeps its scheduler nearly busy."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward_block(batch: int, channels: int, states: int, device: torch.device) -> tuple[int, int]:
    """Channels of a program of the forward pass and its stages of prefetch.

    Sixteen channels of fewer than 16 states would put more states of a channel into a thread than eight do, and sum
    them in another order: what a sequence gives would depend on its batch.
    """
    wide = states >= 16 and batch * -(-channels // 16) >= 2 * _schedulers(device)
    return (16, 4) if wide else (8, 6)


def forward_split(programs: int, windows: int, device: torch.device) -> tuple[int, int]:
    """Programs that do whole sequences, and segments into which the sequences of the others are cut.

    The others are those of the last, partly filled round, in which most schedulers would idle. Where it is the only
    round, nothing hides the pass that finds the states at the cuts, and only long segments are worth it.
    """
    rounds, others = divmod(programs, _schedulers(device))
    cuts = _schedulers(device) // others if others else 1
    if cuts < 2 or rounds >= _ROUNDS or windows // cuts < (16 if rounds else 64):
        return programs, 1
    return programs - others, cuts


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
