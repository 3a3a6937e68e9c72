"""The scan of Mamba-2 for CPUs: chunks of tokens as matrix products, one state handed from chunk to chunk.

Dao & Gu 2024, section 6: inside a chunk the scan is ``Y = (L * C B^T) (delta x)`` with L[t, s] the decay from s to t;
what lies before it enters through the state. A chunk's matrices stay in the cache, so they are made one chunk at a
time, forward and again backward; between the two only the states at the starts of chunks are kept.

Symbols and shapes as in :mod:`simba_lab.kernels.reference`, here with ``delta`` instead of ``dt`` and its bias; R =
H / G heads per group, q tokens in a chunk. The state is held as (B, G, N, R P), so that the heads of a group, which
share B and C, are one product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simba_lab.kernels import reference

CHUNK = 64
"""Most tokens in a chunk: decays cost q per token and head, products between chunks 2 N P. 64 was fastest for P = 64,
N = 128 on two cores of an AMD EPYC."""


@dataclass(frozen=True)
class _Chunk:
    """One chunk's inputs and what forward and backward both need of them."""

    x: Tensor  # (B, q, H, P)
    stepped: Tensor  # (B, q, H, P) delta x
    B: Tensor  # (B, G, q, N)
    C: Tensor  # (B, G, q, N)
    decay: Tensor  # (B, G, R, q, q) exp of the log decay from column to row, 0 above the diagonal
    weights: Tensor  # (B, G, R, q, q) decay C B^T
    entered: Tensor  # (B, q, H, 1) decay from the chunk's start to and with the token
    left: Tensor  # (B, q, H, 1) decay after the token to the chunk's end
    across: Tensor  # (B, G, 1, R, 1) decay over the whole chunk

    @classmethod
    def make(cls, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, tokens: slice) -> _Chunk:
        x, delta = x[:, tokens], delta[:, tokens]
        B, C = (t[:, tokens].transpose(1, 2).contiguous() for t in (B, C))
        groups, length = B.shape[1], x.shape[1]
        logs = (delta * A).cumsum(1)  # (B, q, H)
        by_head = logs.transpose(1, 2).unflatten(1, (groups, -1))
        above = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        decay = (by_head[..., None] - by_head[..., None, :]).masked_fill_(above, -torch.inf).exp_()
        weights = decay * (C @ B.mT)[:, :, None]
        across = logs[:, -1].exp().view(x.shape[0], groups, 1, -1, 1)
        entered, left = logs.exp()[..., None], (logs[:, -1:] - logs).exp()[..., None]
        return cls(x, x * delta[..., None], B, C, decay, weights, entered, left, across)

    def grouped(self, value: Tensor) -> Tensor:
        """(B, q, H, P) as (B, G, q, R P)."""
        return value.unflatten(2, (self.B.shape[1], -1)).transpose(1, 2).flatten(3)

    def by_token(self, value: Tensor) -> Tensor:
        """(B, G, q, R P) as (B, q, H, P)."""
        return value.transpose(1, 2).reshape(self.x.shape)

    def decayed(self, state: Tensor) -> Tensor:
        """A state (B, G, N, R P) carried over the chunk."""
        return (state.unflatten(3, (self.across.shape[3], -1)) * self.across).flatten(3)

    def heads_first(self, value: Tensor) -> Tensor:
        """(B, q, H, P) as (B, G, R, q, P)."""
        return value.transpose(1, 2).unflatten(1, (self.B.shape[1], -1))


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _packed(state: Tensor, groups: int) -> Tensor:
    """(B, H, P, N) as (B, G, N, R P)."""
    return state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(3)


def _unpacked(state: Tensor, like: Tensor) -> Tensor:
    """(B, G, N, R P) in the shape (B, H, P, N) of ``like``, contiguous."""
    return state.unflatten(3, (-1, like.shape[2])).permute(0, 1, 3, 4, 2).reshape(like.shape).contiguous()


def forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, out: Tensor, starts: Tensor,
    chunk: int,
) -> Tensor:  # fmt: skip
    """Fills ``out`` (B, L, H, P) and, unless empty, ``starts`` (chunks, B, G, N, R P); returns the final state."""
    state = _packed(initial, B.shape[2])
    for index, tokens in enumerate(_slices(x.shape[1], chunk)):
        if len(starts):
            starts[index] = state
        c = _Chunk.make(x, delta, A, B, C, tokens)
        inside = (c.weights @ c.heads_first(c.stepped)).flatten(1, 2).transpose(1, 2)
        before = c.by_token(c.C @ state) * c.entered
        torch.add(inside + before, c.x * D[:, None], out=out[:, tokens])
        state = c.decayed(state) + c.B.mT @ c.grouped(c.stepped * c.left)
    return _unpacked(state, initial)


def backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, dout: Tensor, dfinal: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D and initial."""
    dx, ddelta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C))
    dA = torch.zeros_like(A)
    dstate = _packed(dfinal, B.shape[2])
    for index, tokens in reversed(list(enumerate(_slices(x.shape[1], chunk)))):
        c = _Chunk.make(x, delta, A, B, C, tokens)
        dy = dout[:, tokens]
        dstepped, dlogs, dstate, dB[:, tokens], dC[:, tokens] = _chunk_gradients(c, dy, starts[index], dstate)
        dx[:, tokens] = dstepped * delta[:, tokens, :, None] + dy * D[:, None]
        ddelta[:, tokens] = (dstepped * c.x).sum(-1) + dlogs * A
        dA += (dlogs * delta[:, tokens]).sum((0, 1))
    return dx, ddelta, dA, dB, dC, (dout * x).sum((0, 1, 3)), _unpacked(dstate, dfinal)


def _chunk_gradients(
    c: _Chunk, dy: Tensor, state: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of delta x, of delta A (B, q, H), of the state before the chunk, of B and of C (B, q, G, N).

    The gradient of delta A at r collects every path that crosses r, from a source before it to an output at or after
    it. It adds up the paths of one kind at a time: a difference of two sums over all paths would cancel.
    """
    dy_heads = c.heads_first(dy).contiguous()
    dweights = dy_heads @ c.heads_first(c.stepped).mT
    dscores = (dweights * c.decay).sum(2)
    dy_entered, stepped_left = c.grouped(dy * c.entered), c.grouped(c.stepped * c.left)
    dC = dscores @ c.B + dy_entered @ state.mT
    dB = dscores.mT @ c.C + stepped_left @ dstate.mT
    inside = (c.weights.mT @ dy_heads).flatten(1, 2).transpose(1, 2)
    onward = c.by_token(c.B @ dstate) * c.left
    dlogs = _crossing(c, dweights, (dy * c.entered * c.by_token(c.C @ state)).sum(-1), (onward * c.stepped).sum(-1))
    carried = c.decayed(state)
    over = (carried * dstate).unflatten(3, (c.across.shape[3], -1)).sum((2, 4)).flatten(1)
    before = c.decayed(dstate) + c.C.mT @ dy_entered
    return inside + onward, dlogs + over[:, None], before, dB.transpose(1, 2), dC.transpose(1, 2)


def _crossing(c: _Chunk, dweights: Tensor, from_before: Tensor, to_after: Tensor) -> Tensor:
    """Per token r and head (B, q, H): paths inside the chunk, into it up to r or later, and out of it from before r."""
    paths = (dweights * c.weights).tril_(-1)
    inside = (paths.sum(-1) - paths.sum(-2)).flatten(1, 2).transpose(1, 2)
    return (inside + from_before).flip(1).cumsum(1).flip(1) + to_after.cumsum(1) - to_after


@torch.library.custom_op("simba_lab::ssd", mutates_args=(), device_types="cpu")
def _ssd(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, _, starts = _outputs(x, delta, A, B, C, D, initial, chunk, keep_states)
    return out, forward(x, delta, A, B, C, D, initial, out, starts, chunk), starts


@_ssd.register_fake
def _outputs(x, delta, A, B, C, D, initial, chunk, keep_states):  # noqa: ANN001, ANN202
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    chunks = -(-length // chunk) if keep_states else 0
    starts = x.new_empty(chunks, batch, groups, states, heads // groups * width)
    return x.new_empty(x.shape), initial.new_empty(initial.shape), starts


@torch.library.custom_op("simba_lab::ssd_backward", mutates_args=(), device_types="cpu")
def _ssd_backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, dout: Tensor, dfinal: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(x, delta, A, B, C, D, starts, dout, dfinal, chunk)


@_ssd_backward.register_fake
def _(x, delta, A, B, C, D, starts, dout, dfinal, chunk):  # noqa: ANN001, ANN202
    return tuple(t.new_empty(t.shape) for t in (x, delta, A, B, C, D, dfinal))


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    x, delta, A, B, C, D, initial, ctx.chunk, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, output[2])
    ctx.state_shape = initial.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dfinal, _):  # noqa: ANN001, ANN202
    x = ctx.saved_tensors[0]
    dout = x.new_zeros(x.shape) if dout is None else dout
    dfinal = x.new_zeros(ctx.state_shape) if dfinal is None else dfinal
    return *_ssd_backward(*ctx.saved_tensors, dout, dfinal, ctx.chunk), None, None


_ssd.register_autograd(_gradients, setup_context=_context)


def ssd(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd`; a chunk has ``chunk_size`` tokens, but not more than CHUNK."""
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = reference.step_size(dt, dt_bias).to(wide)
    if initial is None:
        initial = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=wide)
    inputs = (x.to(wide), delta, *(t.to(wide) for t in (A, B, C, D, initial)))
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, final, _ = _ssd(*inputs, min(chunk_size, CHUNK), keep_states)
    return out.to(x.dtype), final


@torch.library.custom_op("simba_lab::ssd_impact", mutates_args=(), device_types="cpu")
def _impact(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor, reduce: str, gated: bool
) -> Tensor:
    impact = reference.ssd_impact_per_channel(x, delta, A, B, C_boundary)
    return reference.reduce_channels(impact.mul_(gate[:, None]).flatten(2), reduce)


@_impact.register_fake
def _(x, delta, A, B, C_boundary, gate, reduce, gated):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2])


def ssd_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd_impact`; scores carry no gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        delta = reference.step_size(dt, dt_bias)
        weight = x.new_ones(1) if gate is None else gate
        tensors = (t.to(wide) for t in (x, delta, A, B, C_boundary, weight))
        return _impact(*tensors, reduce, gate is not None)
