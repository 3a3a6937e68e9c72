"""The k highest scores in one Triton kernel: no sort, but a search for the k-th largest and a compaction.

One program takes one sequence. Scores become int32 keys in the same order; the largest key that at least k tokens reach
is found bit by bit from the top, with one count over the sequence per bit, and earlier if exactly k reach it. A running
count then writes the indices in ascending order. Sequences up to ``HELD`` tokens stay in registers, longer ones are
read again for every bit, from the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.gpu.launch import last_contiguous

HELD = 16384
"""Tokens that one program can hold: 16 keys for each of 1024 threads."""
READ, WRITTEN = 8192, 4096
"""Tokens of a longer sequence read at once, and tokens whose indices are written at once."""
PER_THREAD, MAX_WARPS = 16, 32

_LOWEST = tl.constexpr(-(2**31))
_MAGNITUDE = tl.constexpr(2**31 - 1)
_HALF, _LOW = tl.constexpr(16), tl.constexpr(2**16 - 1)


@triton.jit
def _keys(scores, place, length, protected):
    """int32 keys ordered as :func:`simba_lab.kernels.reference.protected_scores`; places after the end rank lowest."""
    inside = place < length
    score = tl.load(scores + place, mask=inside, other=0).to(tl.float32)
    score = tl.where(score != score, float("-inf"), score)
    score = tl.where(place >= length - protected, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LOWEST, 0, bits)  # -0.0 ties with 0.0
    # The bits of a negative number order its magnitude, and so backwards.
    return tl.where(inside, bits ^ ((bits >> 31) & _MAGNITUDE), _LOWEST)


@triton.jit
def _reached(scores, keys, candidate, length, protected, BLOCK: tl.constexpr, IS_HELD: tl.constexpr):
    """How many tokens have a key of at least ``candidate``, which is above the key of places after the end."""
    reached = (keys >= candidate).to(tl.int32)
    if not IS_HELD:
        for start in range(BLOCK, length, BLOCK):
            reached += (_keys(scores, start + tl.arange(0, BLOCK), length, protected) >= candidate).to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def _threshold(scores, length, k, protected, BLOCK: tl.constexpr, IS_HELD: tl.constexpr):
    """A key that at least k tokens reach, and how many do: k, or more where tokens tie with the k-th largest."""
    keys = _keys(scores, tl.arange(0, BLOCK), length, protected)
    threshold, reach, bit = tl.full((), _LOWEST, tl.int32), length, tl.full((), _LOWEST, tl.int32)
    while (bit != 0) & (reach > k):
        candidate = threshold ^ bit  # the bits of the threshold from here down are 0, and the highest is the sign
        reached = _reached(scores, keys, candidate, length, protected, BLOCK, IS_HELD)
        threshold = tl.where(reached >= k, candidate, threshold)
        reach = tl.where(reached >= k, reached, reach)
        bit = (bit >> 1) & _MAGNITUDE
    return threshold, reach


@triton.jit(do_not_specialize=["length", "k", "protected"])
def _select_kernel(
    scores, positions, chosen, at, length, k, protected, scores_batch, positions_batch,
    HAS_POSITIONS: tl.constexpr, IS_HELD: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * scores_batch
    chosen += row * k
    if HAS_POSITIONS:
        positions += row * positions_batch
        at += row * k
    threshold, reach = _threshold(scores, length, k, protected, BLOCK, IS_HELD)
    surplus = reach - k  # so many of the earliest of those that tie at the threshold have to go
    above, ties = 0, 0
    for start in range(0, length, OUT):
        place = start + tl.arange(0, OUT)
        keys = _keys(scores, place, length, protected)
        tie = (keys == threshold) & (place < length)
        ones = (keys > threshold).to(tl.int32) + (tie.to(tl.int32) << _HALF)  # two counts in one number
        counts = tl.cumsum(ones, 0)
        ties_kept = ties + (counts >> _HALF) - surplus
        kept = (keys > threshold) | (tie & (ties_kept > 0))
        rank = above + (counts & _LOW) + tl.maximum(ties_kept, 0) - 1
        tl.store(chosen + rank, place.to(tl.int64), mask=kept)
        if HAS_POSITIONS:
            tl.store(at + rank, tl.load(positions + place, mask=kept, other=0), mask=kept)
        total = tl.sum(ones, 0)
        above += total & _LOW
        ties += total >> _HALF


def _layout(length: int) -> tuple[bool, int, int, int]:
    """Whether a program holds the whole sequence, its blocks when searching and when writing, and its warps."""
    is_held = length <= HELD
    block = triton.next_power_of_2(length) if is_held else READ
    return is_held, block, min(block, WRITTEN), min(MAX_WARPS, max(1, block // (32 * PER_THREAD)))


@torch.library.custom_op("simba_lab::select_tokens_triton", mutates_args=())
def _select(scores: Tensor, k: int, protected: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    chosen, at = _outputs(scores, k, positions)
    if chosen.numel() == 0:
        return chosen, at
    scores, positions = last_contiguous(scores), None if positions is None else last_contiguous(positions)
    is_held, block, out, warps = _layout(scores.shape[1])
    with torch.cuda.device_of(scores):
        _select_kernel[(scores.shape[0],)](
            scores, positions, chosen, at, scores.shape[1], k, protected, scores.stride(0),
            0 if positions is None else positions.stride(0), positions is not None, is_held, block, out,
            num_warps=warps,
        )  # fmt: skip
    return chosen, at


def _outputs(scores: Tensor, k: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unfilled indices and, if positions are given, the positions of the chosen."""
    shape = (scores.shape[0], k)
    at = (0,) if positions is None else shape
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(at, dtype=torch.int64)


@_select.register_fake
def _(scores, k, protected, positions):  # noqa: ANN001, ANN202
    return _outputs(scores, k, positions)


def select_tokens(scores: Tensor, k: int, protected: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.select_tokens`; fp64 scores, whose keys need 64 bits, take its way."""
    if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return reference.select_tokens(scores, k, protected, positions)
    chosen, at = _select(scores.detach(), k, protected, positions)
    return chosen, chosen if positions is None else at
