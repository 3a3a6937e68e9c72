"""Criteria: signals of a layer -> one score per token, higher is kept. They only score, never decide how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import cost
from simba_lab.pruning.hashing import mix, mix_int
from simba_lab.pruning.signals import OwnImpact, ScoredShape, Signals
from simba_lab.registry import Registry


class Criterion(ABC):
    """Scores the tokens of one layer.

    Subclass it, implement :meth:`score`, and name the class by ``class_path`` wherever a criterion is asked for. Init
    arguments must be plain data kept under their names. Scores may use any signal; all of them belong to the context,
    so a criterion cannot see the suffix.
    """

    op: ClassVar[str | None] = None
    """Name under which the op is charged; None: measured by counting what :meth:`score` executes."""
    own_impact: OwnImpact | None = None
    """What :meth:`score` asks :func:`impact_on_output` for, if it does: some backends compute it within the scan."""

    @abstractmethod
    def score(self, signals: Signals) -> Tensor:
        """Scores (B, k), floating point, higher is kept; gradients do not flow through them."""

    def flops(self, shape: ScoredShape) -> int:
        """FLOPs of scoring one sequence. The default runs ``score`` on the meta device and counts its operations."""
        from simba_lab.pruning.measure import measured_flops

        return measured_flops(self, shape)


CRITERIA: Registry[Criterion] = Registry("criterion", Criterion)


def checked_scores(criterion: Criterion, signals: Signals) -> Tensor:
    """``criterion.score(signals)``; raises InputError for anything but one score per token."""
    scores = criterion.score(signals)
    expected = tuple(signals.positions.shape)
    got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if got != expected:
        name = CRITERIA.name_of(criterion)
        raise InputError(f"criterion {name}: score must return (batch, tokens) = {expected}, got {got}")
    return scores


REDUCTIONS = ("max", "absmax", "l2")


def check_reduce(criterion: str, reduce: str) -> str:
    """``reduce`` if the impact ops know it; raises InputError."""
    if reduce not in REDUCTIONS:
        raise InputError(f"criterion {criterion}: reduce must be max, absmax or l2, got {reduce!r}")
    return reduce


def impact_on_boundary(signals: Signals, query: Tensor, weight: Tensor | None, reduce: str) -> Tensor:
    """What each token left in the boundary's state, read by ``query``: scores (B, k).

    ``query`` has the shape of one token's C: (B, N), in Mamba-2 (B, G, N); the boundary's own C gives its output.
    ``weight`` (B, D) multiplies the channels before they are reduced. One call of the backend's op of the generation;
    with an A per head the impact is one number per head times x, so that no state needs a power of its own.
    """
    op, x = signals.backend.global_impact, signals.x
    if signals.per_head:
        op, x = signals.backend.ssd_impact, signals.heads(x)
        weight = None if weight is None else signals.heads(weight)
    return op(x, signals.dt, signals.dt_bias, signals.A, signals.B, query, weight, reduce)


def impact_on_output(signals: Signals, own: OwnImpact) -> Tensor:
    """What each token adds to the boundary's own output: scores (B, k), as the scan found them or computed now."""
    if signals.scanned is not None and signals.scanned[0] == own:
        return signals.scanned[1]
    gate = F.silu(signals.z[:, -1]) if own.gated else None
    return impact_on_boundary(signals, signals.C[:, -1], gate, own.reduce)


def impact_flops(shape: ScoredShape, weighted: bool, reduce: str) -> int:
    """Cost of :func:`impact_on_boundary` for one sequence."""
    if shape.n_heads is not None:
        return cost.ssd_impact(
            shape.n_tokens, shape.d_inner, shape.n_heads, shape.n_groups, shape.d_state, weighted, reduce
        )
    return cost.global_impact(shape.n_tokens, shape.d_inner, shape.d_state, weighted, reduce)


@CRITERIA.register("global_impact")
class GlobalImpact(Criterion):
    """What the token adds to the boundary's output through the recurrence (Simba).

    ``reduce`` over channels: ``max`` (the paper), ``absmax``, ``l2``. ``gated`` weighs channel d by silu(z_b[d]), which
    is how much of it leaves the layer at the boundary (in Mamba-2 it passes a norm on the way).
    """

    op = "global_impact"

    def __init__(self, reduce: str = "max", gated: bool = False) -> None:
        self.reduce = check_reduce("global_impact", reduce)
        self.gated = gated
        self.own_impact = OwnImpact(reduce, gated)

    def score(self, signals: Signals) -> Tensor:
        return impact_on_output(signals, self.own_impact)

    def flops(self, shape: ScoredShape) -> int:
        return impact_flops(shape, self.gated, self.reduce)


@CRITERIA.register("local_delta")
class LocalDelta(Criterion):
    """L2 norm of the token's step sizes over channels, in Mamba-2 over heads (DeciMamba)."""

    op = "vector_norm"

    def score(self, signals: Signals) -> Tensor:
        return torch.linalg.vector_norm(signals.delta, dim=-1)

    def flops(self, shape: ScoredShape) -> int:
        return cost.vector_norm(shape.n_tokens, shape.n_steps)


@CRITERIA.register("norm")
class Norm(Criterion):
    """L2 norm of the token's residual-stream vector: attention-free, needs no recurrence."""

    op = "vector_norm"

    def score(self, signals: Signals) -> Tensor:
        wide = torch.promote_types(signals.hidden.dtype, torch.float32)
        return torch.linalg.vector_norm(signals.hidden, dim=-1, dtype=wide)

    def flops(self, shape: ScoredShape) -> int:
        return cost.vector_norm(shape.n_tokens, shape.d_model)


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform in [0, 1), keyed by (seed, layer, sequence, position): the same in any batch and on any device."""

    op = "none"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, signals: Signals) -> Tensor:
        key = mix(signals.sequence_key + mix_int(self.seed * 65_537 + signals.layer))
        bits = mix(key[:, None] + mix(signals.positions + 1))
        return ((bits >> 24) & 0xFF_FFFF).to(torch.float32) / 0x100_0000

    def flops(self, shape: ScoredShape) -> int:
        return 0


@CRITERIA.register("recency")
class Recency(Criterion):
    """The position: keeps the newest tokens. The control that any claim about a criterion must beat."""

    op = "none"

    def score(self, signals: Signals) -> Tensor:
        return signals.positions.to(torch.float32)

    def flops(self, shape: ScoredShape) -> int:
        return 0
