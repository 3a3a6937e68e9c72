"""What a criterion is given of a layer, and the sizes by which its cost is stated."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.kernels import Backend


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
class OwnImpact:
    """An impact on the boundary's own output: reduced over channels so, each weighted by the boundary's gate or not."""

    reduce: str
    gated: bool = False


@dataclass(frozen=True)
class Signals:
    """What a layer computed for the k context tokens present in it; nothing of the suffix is in here.

    Shapes: B sequences, k tokens, D inner channels, N states, M model channels, T original context length. Comments
    give them for Mamba-1. In Mamba-2 the D channels are H heads of P, one after the other, and G groups of heads share
    B and C: dt and delta are (B, k, H), dt_bias and A (H,), B and C (B, k, G, N), the rest is the same.
    Some fields may be given as functions: few criteria read them, and each costs a pass over tokens or weights.
    """

    layer: int
    backend: Backend
    x: Tensor  # (B, k, D) input of the scan, after convolution and SiLU
    dt: Tensor  # (B, k, D) step before bias and softplus
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    B: Tensor  # (B, k, N)
    C: Tensor  # (B, k, N)
    z: Tensor = _OnDemand()  # (B, k, D) gate before SiLU
    hidden: Tensor = _OnDemand()  # (B, k, M) residual-stream vectors after this layer
    positions: Tensor  # (B, k) int64, original positions, ascending
    sequence_key: Tensor = _OnDemand()  # (B,) int64, a hash of the context's token ids
    channel_norms: Tensor | None = _OnDemand(optional=True)  # (D,) how far a channel moves the residual stream
    ahead: LookAhead | None = None  # what a later layer would make of these tokens
    scanned: tuple[OwnImpact, Tensor] | None = None  # an impact that the scan has found on its way, (B, k)
    n_free: int | None = None  # so many of the oldest may be dropped, the rest stays whatever its score; None: all

    def changed(self, **fields: Tensor) -> Signals:
        """A copy with other ``fields``; unlike one by ``dataclasses``, it leaves what nobody has read uncomputed."""
        twin = copy.copy(self)
        for name, value in fields.items():
            object.__setattr__(twin, name, value)
        return twin

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
        ahead = () if self.ahead is None else (self.ahead.flops, self.ahead.n_layers, self.ahead.reach)
        return dataclasses.replace(ScoredShape(*sizes, *ahead), n_free=self.n_free)


@dataclass(frozen=True)
class LookAhead:
    """A later layer's mixer, up to its scan and without its gate, on the residual stream as it is now.

    Attributes:
        signals: (layer, stream (B, k, M)) to the signals of that layer, which itself may not look further. A slice of
            the tokens as third argument says that the stream is of these alone: the first of them have no neighbours.
        n_layers: of the model.
        flops: of a call, for each token; to read the gate ``z`` of its signals costs more, and is not charged.
        reach: tokens that a layer's convolution reads for one, itself included.
    """

    signals: Callable[..., Signals]
    n_layers: int
    flops: int
    reach: int


@dataclass(frozen=True)
class ScoredShape:
    """Sizes a criterion's cost may depend on; ``n_heads`` None means a step size for every channel, as in Mamba-1.

    ``ahead``: FLOPs of looking into a later layer, per token. ``n_layers``: of the model, None where there is no model.
    ``reach``: tokens that the convolution reads for one. ``n_free``: as in :class:`Signals`.
    """

    n_tokens: int
    d_model: int
    d_inner: int
    d_state: int
    n_heads: int | None = None
    n_groups: int = 1
    ahead: int = 0
    n_layers: int | None = None
    reach: int = 1
    n_free: int | None = None

    @property
    def n_steps(self) -> int:
        """Step sizes per token."""
        return self.d_inner if self.n_heads is None else self.n_heads
