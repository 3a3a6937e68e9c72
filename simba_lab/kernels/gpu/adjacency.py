"""How many true neighbours stand directly before each token, counted in one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.kernels.gpu.launch import last_contiguous

BLOCK = 256


@triton.jit
def _position(positions, place, kept, n_context, exists):
    """Where the token at ``place`` stands in the text: kept tokens where they say, those of the suffix behind them."""
    given = tl.load(positions + place, mask=exists & (place < kept), other=0)
    return tl.where(place < kept, given, n_context + place - kept)


@triton.jit(do_not_specialize=["kept", "n_context", "length"])
def _count_kernel(
    positions, neighbours, kept, n_context, length, positions_batch, W: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    positions += batch * positions_batch
    own = _position(positions, place, kept, n_context, place < length)
    known = tl.zeros((BLOCK,), tl.int64)
    for distance in tl.static_range(1, W):
        exists = (place >= distance) & (place < length)
        earlier = _position(positions, place - distance, kept, n_context, exists)
        known += (exists & (own - earlier == distance)).to(tl.int64)
    tl.store(neighbours + batch * length + place, known, mask=place < length)


@torch.library.custom_op("simba_lab::true_neighbours_triton", mutates_args=())
def _count(positions: Tensor, n_context: int, n_suffix: int, width: int) -> Tensor:
    batch, kept = positions.shape
    neighbours = positions.new_empty(batch, kept + n_suffix)
    if neighbours.numel() == 0:
        return neighbours
    positions = last_contiguous(positions)
    with torch.cuda.device_of(positions):
        _count_kernel[(triton.cdiv(kept + n_suffix, BLOCK), batch)](
            positions, neighbours, kept, n_context, kept + n_suffix, positions.stride(0), width, BLOCK
        )
    return neighbours


@_count.register_fake
def _(positions, n_context, n_suffix, width):  # noqa: ANN001, ANN202
    return positions.new_empty(positions.shape[0], positions.shape[1] + n_suffix)


def true_neighbours(positions: Tensor, n_context: int, n_suffix: int, width: int) -> Tensor:
    """See :func:`simba_lab.kernels.reference.true_neighbours`."""
    return _count(positions, n_context, n_suffix, width)
