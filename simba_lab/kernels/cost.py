"""What each op costs, in FLOPs = 2 x multiply-adds (design page, section 6), and the ledger of what was executed.

Free by convention, in every arm alike: embedding look-up, norms, residual additions, activations (softplus, SiLU),
gathers. A backward pass costs twice its forward pass; recomputation inside a kernel is not charged, so that the
numbers do not depend on the backend. For the same reason the scan of Mamba-2 is charged as the recurrence it computes,
whatever a kernel spends on the matrix products of its chunks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

CONVENTION = (
    "FLOPs = 2 x multiply-adds; scan 9 d_inner d_state per token (Mamba-2: 7); scoring and selection included; "
    "embedding, norms, activations, gathers free; backward = 2 x forward"
)


def linear(rows: int, d_in: int, d_out: int) -> int:
    return 2 * rows * d_in * d_out


def causal_conv(tokens: int, channels: int, width: int) -> int:
    return 2 * tokens * channels * width


def selective_scan(tokens: int, channels: int, states: int) -> int:
    return 9 * tokens * channels * states


def ssd(tokens: int, channels: int, states: int) -> int:
    """The 9 of :func:`selective_scan` less exponent and exp, which Mamba-2 has per head and not per channel and state.

    This is Megatron-LM's count of the recurrence too. Chunked matrix products execute more and are not charged.
    """
    return 7 * tokens * channels * states


def global_impact(tokens: int, channels: int, states: int, gated: bool, reduce: str) -> int:
    """Per channel and state: exponent, exp, multiply, add; per state: B C; per channel: step sum, two products, max.

    A gate adds a product per channel, the L2 reduction one more (square and add instead of a comparison).
    """
    per_channel = 4 + int(gated) + int(reduce == "l2")
    return tokens * (4 * channels * states + states + per_channel * channels)


def ssd_impact(tokens: int, channels: int, heads: int, groups: int, states: int, gated: bool, reduce: str) -> int:
    """Per group and state: multiply, add; per head: step sum, exponent, exp, two products; per channel: product, max.

    Gate and L2 reduction as in :func:`global_impact`.
    """
    per_channel = 2 + int(gated) + int(reduce == "l2")
    return tokens * (2 * groups * states + 5 * heads + per_channel * channels)


def vector_norm(tokens: int, channels: int) -> int:
    """L2 norm over channels: a square and an addition each."""
    return 2 * tokens * channels


def select(tokens: int) -> int:
    """Sorting the scores of one sequence: one comparison counts as one FLOP."""
    return tokens * math.ceil(math.log2(tokens)) if tokens > 1 else 0


class Ledger:
    """FLOPs of what really ran, by (phase, layer, op); phase is forward or backward, layer -1 is outside the layers."""

    def __init__(self) -> None:
        self.entries: Counter[tuple[str, int, str]] = Counter()

    def add(self, phase: str, layer: int, op: str, flops: int) -> None:
        self.entries[phase, layer, op] += flops

    @property
    def total(self) -> int:
        return sum(self.entries.values())

    def by_op(self) -> dict[str, int]:
        table: Counter[str] = Counter()
        for (_, _, op), flops in self.entries.items():
            table[op] += flops
        return dict(table)


_open_ledger: ContextVar[Ledger | None] = ContextVar("open_ledger", default=None)


@contextmanager
def recording(ledger: Ledger) -> Iterator[Ledger]:
    """Every op that runs inside, and the backward pass of its output whenever that runs, is charged to ``ledger``."""
    token = _open_ledger.set(ledger)
    try:
        yield ledger
    finally:
        _open_ledger.reset(token)


def is_recording() -> bool:
    return _open_ledger.get() is not None


def charge(layer: int, op: str, flops: int, output: Tensor | None = None) -> None:
    """Charge an op that has just run; with ``output`` given, also its backward pass when a gradient reaches it."""
    ledger = _open_ledger.get()
    if ledger is None:
        return
    ledger.add("forward", layer, op, flops)
    if output is not None and output.requires_grad:
        output.register_hook(lambda gradient: ledger.add("backward", layer, op, 2 * flops))
