"""Suffix negative log-likelihood of one model over a set of windows, with the FLOPs that ran and the time they took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from simba_lab.budget import refuse_altered
from simba_lab.data import EvalWindows, evidence_groups, group_bounds, is_far
from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import LanguageModel
from simba_lab.training.guard import FiniteWatch


@dataclass(frozen=True)
class WindowScores:
    """nll (W, n_suffix) in nats; seconds of the forward passes alone; flops_by_op of one window, from the ledger."""

    nll: NDArray[np.float32]
    seconds: float
    flops_by_op: dict[str, int]

    @property
    def flops(self) -> int:
        """FLOPs per window."""
        return sum(self.flops_by_op.values())


@torch.no_grad()
def score_windows(
    model: LanguageModel,
    windows: EvalWindows,
    batch_size: int,
    n_context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> WindowScores:
    """Score the suffix of every window after its (pruned) context; protocol ``suffix``.

    ``n_context`` reads only the newest so many context tokens. ``progress`` is told the number of windows done. The
    first batch runs once unmeasured, so that compiling kernels is not charged to the arm.

    Raises NotFinite if a score, state or logit is not finite, naming the layer and the windows; InputError for a model
    that is compiled or altered and for a criterion that executes more than it is charged for; BudgetMismatch for an arm
    that changes while it runs.
    """
    reach = windows.n_context if n_context is None else n_context
    if not 1 <= reach <= windows.n_context:
        raise InputError(f"n_context must lie in 1..{windows.n_context}, the context of the windows, got {reach}")
    refuse_altered(model)
    watch = FiniteWatch(model)
    tokens = windows.tokens[:, windows.n_context - reach :]
    watch.watched(tokens[:batch_size].to(model.device), n_context=reach)
    ledger, nll, seconds = Ledger(), [], 0.0
    for first in range(0, len(tokens), batch_size):
        batch = tokens[first : first + batch_size].to(model.device)
        started = time.perf_counter()
        with recording(ledger):
            out = watch.watched(batch, n_context=reach)
            nll.append(_suffix_nll(out.logits, batch, reach))
        seconds += time.perf_counter() - started
        watch.check(out, f"windows {first} to {first + len(batch) - 1}")
        if progress is not None:
            progress(first + len(batch))
    per_window = {op: _exactly(flops, len(tokens), op) for op, flops in ledger.by_op().items()}
    return WindowScores(np.concatenate(nll), seconds, per_window)


def _exactly(flops: int, windows: int, op: str) -> int:
    if flops % windows:
        raise BudgetMismatch(f"{op} did not cost the same in every window: the schedule changed while the arm ran")
    return flops // windows


def _suffix_nll(logits: Tensor, tokens: Tensor, n_context: int) -> NDArray[np.float32]:
    logits = logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, n_context:].flatten(), reduction="none")
    return nll.view(len(tokens), -1).cpu().numpy()


@dataclass(frozen=True)
class Face:
    """One face of quality: per window the sum of NLL (W,) and the number of tokens (W,) it is the sum of."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float | None:
        """Nats per token; None if no token is scored."""
        total = self.tokens.sum()
        return float(self.nll.sum() / total) if total else None


def plain_face(nll: NDArray[np.float32], windows: EvalWindows) -> Face:
    """All suffix tokens that count."""
    return _face(nll, windows.counted)


def far_face(nll: NDArray[np.float32], windows: EvalWindows, reach: int) -> Face:
    """Suffix tokens whose last occurrence lies before the newest ``reach`` context tokens (design page, section 5)."""
    return _face(nll, windows.counted & is_far(windows.last_occurrence, windows.n_context, reach))


def _face(nll: NDArray[np.float32], counted: NDArray[np.bool_]) -> Face:
    return Face((nll * counted).sum(1, dtype=np.float64), counted.sum(1).astype(np.float64))


def answered(nll: NDArray[np.float32], windows: EvalWindows) -> float:
    """Share of windows whose counted tokens together have a probability above a half."""
    return float((plain_face(nll, windows).nll < math.log(2)).mean())


def by_distance(nll: NDArray[np.float32], windows: EvalWindows, edges: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens and mean NLL by evidence distance; low and high are both None for tokens never seen before."""
    groups = evidence_groups(windows.last_occurrence, windows.n_context, edges)
    table = []
    for group, (low, high) in [*enumerate(group_bounds(edges)), (-1, (None, None))]:
        chosen = nll[windows.counted & (groups == group)]
        mean = float(chosen.mean(dtype=np.float64)) if chosen.size else None
        table.append({"low": low, "high": high, "tokens": int(chosen.size), "nll": mean})
    return table


def distance_edges(reach: int, n_context: int) -> list[int]:
    """Powers of four up to the reach of the shorter context, the reach, and half-way from it to the whole context."""
    powers = [4**power for power in range(1, 12) if 4**power < reach]
    return sorted({*powers, reach, (reach + n_context) // 2} - {1})
