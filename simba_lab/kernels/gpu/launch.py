"""How many programs of what size the scan is started with: fixed rules of the shapes, so that runs repeat exactly.

Measured on an H200 with 16 states: blocks of eight channels in one warp beat wider ones forward and backward, because
nothing then waits at a barrier; six stages of prefetch hide the latency that one warp to a scheduler leaves open.
"""

from __future__ import annotations

from torch import Tensor

BLOCK = 8
"""Channels of a program of one warp."""
STAGES = 6
"""Tiles of eight steps on their way while one is computed."""
BACKWARD_STAGES = 3
_BUSY = 3072
"""Programs that fill a large GPU (an H200 has 132 multiprocessors of four schedulers)."""


def on_gpu(t: Tensor) -> bool:
    """False for Triton's interpreter, which runs the kernels on CPU tensors and knows no PTX."""
    return t.is_cuda


def segments(programs: int, windows: int) -> int:
    """Parts of a sequence of ``windows`` windows whose backward passes run side by side."""
    return max(1, min(-(-_BUSY // programs), windows))
