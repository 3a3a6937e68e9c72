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

from simba_lab.kernels.cpu import decay


@dataclass(frozen=True)
class _Chunk:
    """One chunk's inputs and what forward and backward both need of them."""

    x: Tensor  # (B, q, H, P)
    stepped: Tensor  # (B, q, H, P) delta x
    B: Tensor  # (B, G, q, N)
    C: Tensor  # (B, G, q, N)
    logs: Tensor  # (B, H, q), fp64: running sums of delta A
    scores: Tensor  # (B, G, q, q) C B^T
    weights: Tensor  # (B, G, R, q, q) scores times the decay from column to row, 0 above the diagonal
    entered: Tensor  # (B, q, H, 1) decay from the chunk's start to and with the token
    left: Tensor  # (B, q, H, 1) decay after the token to the chunk's end
    across: Tensor  # (B, G, 1, R, 1) decay over the whole chunk

    @classmethod
    def make(cls, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, tokens: slice) -> _Chunk:
        x, delta = x[:, tokens], delta[:, tokens]
        B, C = (t[:, tokens].transpose(1, 2).contiguous() for t in (B, C))
        batch, length, heads, _ = x.shape
        sums = (delta.double() * A.double()).cumsum(1)
        logs, scores = sums.transpose(1, 2).contiguous(), C @ B.mT
        weights = x.new_empty(batch, heads, length, length)
        decay.weigh(logs.numpy(), scores.numpy(), weights.numpy())
        entered, left = (t.exp().to(x.dtype)[..., None] for t in (sums, sums[:, -1:] - sums))
        across = entered[:, -1].view(batch, B.shape[1], 1, -1, 1)
        weights = weights.unflatten(1, (B.shape[1], -1))
        return cls(x, x * delta[..., None], B, C, logs, scores, weights, entered, left, across)

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
    """A contiguous copy of (B, G, N, R P) in the shape (B, H, P, N) of ``like``."""
    by_head = state.unflatten(3, (-1, like.shape[2])).permute(0, 1, 3, 4, 2)
    return by_head.clone(memory_format=torch.contiguous_format).view(like.shape)


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
    it. It adds up the paths of one kind at a time, those inside the chunk in fp64: they come as differences of sums in
    which the paths that do not cross r cancel.
    """
    dy_heads = c.heads_first(dy).contiguous()
    dweights = dy_heads @ c.heads_first(c.stepped).mT
    dscores, paths = _spread(c, dweights.flatten(1, 2))
    dy_entered, stepped_left = c.grouped(dy * c.entered), c.grouped(c.stepped * c.left)
    dC = dscores @ c.B + dy_entered @ state.mT
    dB = dscores.mT @ c.C + stepped_left @ dstate.mT
    inside = (c.weights.mT @ dy_heads).flatten(1, 2).transpose(1, 2)
    onward = c.by_token(c.B @ dstate) * c.left
    from_before, to_after = (dy * c.entered * c.by_token(c.C @ state)).sum(-1), (onward * c.stepped).sum(-1)
    dlogs = (paths + from_before).flip(1).cumsum(1).flip(1)
    dlogs[:, 1:] += to_after[:, :-1].cumsum(1)
    carried = c.decayed(state)
    over = (carried * dstate).unflatten(3, (c.across.shape[3], -1)).sum((2, 4)).flatten(1)
    before = c.decayed(dstate) + c.C.mT @ dy_entered
    return inside + onward, (dlogs + over[:, None]).to(dy.dtype), before, dB.transpose(1, 2), dC.transpose(1, 2)


def _spread(c: _Chunk, dweights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the scores; per token (B, q, H), fp64: paths that end there less those that start, in the chunk."""
    dscores, rows = torch.empty_like(c.scores), torch.empty_like(c.logs)
    columns = rows.new_empty(-(-rows.shape[2] // decay.ROWS), *rows.shape)
    arrays = (c.logs, c.scores, dweights.contiguous(), dscores, rows, columns)
    decay.spread(*(t.numpy() for t in arrays))
    return dscores, (rows - columns.sum(0)).transpose(1, 2)
