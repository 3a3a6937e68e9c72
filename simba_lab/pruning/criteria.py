"""Criteria: signals of a layer -> one score per token, higher is kept. They only score, never decide how many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import Backend, cost
from simba_lab.registry import Registry


class _OnDemand:
    """A field that may be given as a function: it is called when the field is first read, and not if it never is.

    ``optional``: the field may be left out and is None then.
    """

    def __init__(self, optional: bool = False) -> None:
        self._optional = optional

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._key = name, f"_{name}"

    def __get__(self, instance: Signals | None, owner: type | None = None) -> Tensor:
        if instance is None:
            if self._optional:
                return None  # which dataclass takes for the default
            raise AttributeError(self._name)  # tells dataclass that the field has no default
        value = instance.__dict__[self._key]
        if callable(value):
            value = instance.__dict__[self._key] = value()
        return value

    def __set__(self, instance: Signals, value: Tensor | Callable[[], Tensor]) -> None:
        instance.__dict__[self._key] = value


@dataclass(frozen=True)
class Signals:
    """What a layer computed for the k context tokens present in it; nothing of the suffix is in here.

    Shapes: B sequences, k tokens, D inner channels, N states, M model channels, T original context length. Comments
    give them for Mamba-1. In Mamba-2 the D channels are H heads of P, one after the other, and G groups of heads share
    B and C: dt and delta are (B, k, H), dt_bias and A (H,), B and C (B, k, G, N), the rest is the same.
    The last fields may be given as functions: few criteria read them, and each costs a pass over tokens or weights.
    """

    layer: int
    backend: Backend
    x: Tensor  # (B, k, D) input of the scan, after convolution and SiLU
    dt: Tensor  # (B, k, D) step before bias and softplus
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    B: Tensor  # (B, k, N)
    C: Tensor  # (B, k, N)
    z: Tensor  # (B, k, D) gate before SiLU
    hidden: Tensor = _OnDemand()  # (B, k, M) residual-stream vectors after this layer
    positions: Tensor  # (B, k) int64, original positions, ascending
    sequence_key: Tensor = _OnDemand()  # (B,) int64, a hash of the context's token ids
    channel_norms: Tensor | None = _OnDemand(optional=True)  # (D,) how far a channel moves the residual stream
    ahead: LookAhead | None = None  # what a later layer would make of these tokens

    @property
    def delta(self) -> Tensor:
        """Step sizes (B, k, D): softplus(dt + dt_bias), fp32 at least."""
        wide = torch.promote_types(self.dt.dtype, torch.float32)
        return F.softplus(self.dt.to(wide) + self.dt_bias.to(wide))

    @property
    def per_head(self) -> bool:
        """Whether step sizes and A belong to heads (Mamba-2) and not to channels (Mamba-1)."""
        return self.A.dim() == 1

    def heads(self, channels: Tensor) -> Tensor:
        """(..., D) as (..., H, P), for Mamba-2."""
        return channels.unflatten(-1, (self.A.shape[0], -1))

    @property
    def shape(self) -> ScoredShape:
        """Sizes of what is scored, those of one sequence."""
        (_, tokens, inner), width, states = self.x.shape, self.hidden.shape[-1], self.B.shape[-1]
        heads, groups = (self.A.shape[0], self.B.shape[2]) if self.per_head else (None, 1)
        sizes = [None if size is None else int(size) for size in (tokens, width, inner, states, heads, groups)]
        return ScoredShape(*sizes, 0 if self.ahead is None else self.ahead.flops)


@dataclass(frozen=True)
class LookAhead:
    """A later layer's mixer, up to its scan, on the residual stream as it is now.

    Attributes:
        signals: (layer, stream (B, k, M)) to the signals of that layer, which itself may not look further.
        n_layers: of the model.
        flops: of one call for one sequence.
    """

    signals: Callable[[int, Tensor], Signals]
    n_layers: int
    flops: int


@dataclass(frozen=True)
class ScoredShape:
    """Sizes a criterion's cost may depend on; ``n_heads`` None means a step size for every channel, as in Mamba-1.

    ``ahead``: FLOPs of looking into a later layer once.
    """

    n_tokens: int
    d_model: int
    d_inner: int
    d_state: int
    n_heads: int | None = None
    n_groups: int = 1
    ahead: int = 0

    @property
    def n_steps(self) -> int:
        """Step sizes per token."""
        return self.d_inner if self.n_heads is None else self.n_heads


class Criterion(ABC):
    """Scores the tokens of one layer.

    Subclass it, implement :meth:`score`, and name the class by ``class_path`` wherever a criterion is asked for. Init
    arguments must be plain data kept under their names. Scores may use any signal; all of them belong to the context,
    so a criterion cannot see the suffix.
    """

    op: ClassVar[str | None] = None
    """Name under which the op is charged; None: measured by counting what :meth:`score` executes."""

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

    def score(self, signals: Signals) -> Tensor:
        gate = F.silu(signals.z[:, -1]) if self.gated else None
        return impact_on_boundary(signals, signals.C[:, -1], gate, self.reduce)

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


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def mix(value: Tensor) -> Tensor:
    """A bijection of int64 that scatters bits (the finaliser of SplitMix64, Steele et al. 2014); wraps around."""
    value = (value ^ _shift(value, 30)) * _MIX[0]
    value = (value ^ _shift(value, 27)) * _MIX[1]
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed integer."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix_int(value: int) -> int:
    """:func:`mix` of one number, without a tensor: reading one back would make a CUDA device wait."""
    value %= 1 << 64
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        value = (value ^ (value >> shift)) * factor % (1 << 64)
    return _signed(value ^ (value >> 31))


def sequence_key(tokens: Tensor) -> Tensor:
    """Hash (B,) of token ids (B, T): depends on every token and its place, not on the batch."""
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) << 32
    return mix(mix(tokens + place).sum(1))
