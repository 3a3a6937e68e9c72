"""The global impact of tokens as an operation: Triton kernels behind ``torch.library``, with shape inference."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu import launch
from simba_lab.kernels.gpu.impact_kernels import combine_strips, pack_weights, sum_steps, walk_chunks

CHUNK, STRIP = 64, 64
WARPS, STAGES = 4, 3
PROGRAMS = 128
"""Programs that one sequence is cut into at least; depends on no batch size, so that no sum does."""
LONGEST_WALK = 32
REDUCTIONS = ("max", "absmax", "l2")


def _stretches(length: int, channels: int) -> tuple[int, int]:
    """Stretches that a sequence is cut into, and chunks in each."""
    chunks, strips = triton.cdiv(length, CHUNK), triton.cdiv(channels, STRIP)
    walk = triton.cdiv(chunks, max(triton.cdiv(PROGRAMS, strips), triton.cdiv(chunks, LONGEST_WALK)))
    return triton.cdiv(chunks, walk), walk


def _chunk_sums(dt: Tensor, dt_bias: Tensor, chunks: int, rough: bool) -> Tensor:
    """Steps / ln 2 summed over the last ``chunks`` chunks of the sequence (B, chunks, D), fp32, the last one first."""
    batch, length, channels = dt.shape
    sums = dt.new_empty(batch, chunks, channels, dtype=torch.float32)
    if chunks:
        sum_steps[(triton.cdiv(channels, STRIP), chunks, batch)](
            dt, dt_bias, sums, length, channels, dt.stride(0), dt.stride(1),
            ROUGH=rough, CHUNK=CHUNK, STRIP=STRIP, FAST=launch.on_gpu(dt), num_warps=4,
        )  # fmt: skip
    return sums


def _padded(states: int) -> int:
    """A matrix product has an inner size of at least 16."""
    return max(16, triton.next_power_of_2(states))


def _packed_weights(B: Tensor, C_boundary: Tensor) -> tuple[Tensor, Tensor]:
    """w_t[n] = C_b[n] B_t[n] as the series wants it: see :func:`simba_lab.kernels.gpu.impact_kernels.pack_weights`."""
    (batch, length, states), tokens = B.shape, 64
    packed = B.new_empty(batch, length, 2, _padded(states), dtype=torch.float16)
    sizes = B.new_empty(batch, length, dtype=torch.float32)
    pack_weights[(triton.cdiv(length, tokens), batch)](
        B, C_boundary, packed, sizes, length, B.stride(0), B.stride(1), C_boundary.stride(0),
        N=states, STATES=_padded(states), TOKENS=tokens, FAST=launch.on_gpu(B), num_warps=4,
    )  # fmt: skip
    return packed, sizes


@torch.library.custom_op("simba_lab::global_impact_triton", mutates_args=())
def _impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None, reduce: str,
    series: bool,
) -> Tensor:  # fmt: skip
    batch, length, channels = x.shape
    scores = x.new_empty(batch, length, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    x, dt, B, C_boundary = map(launch.last_contiguous, (x, dt, B, C_boundary))
    dt_bias, A = dt_bias.contiguous(), A.contiguous()
    gate = None if gate is None else launch.last_contiguous(gate)
    stretches, walk = _stretches(length, channels)
    strips, fast, code = triton.cdiv(channels, STRIP), launch.on_gpu(x), REDUCTIONS.index(reduce)
    with torch.cuda.device_of(x):
        sums = _chunk_sums(dt, dt_bias, (stretches - 1) * walk, series)
        packed, sizes = _packed_weights(B, C_boundary) if series else (scores, scores)
        partial = scores.new_empty(batch, strips, length)
        walk_chunks[(strips, stretches, batch)](
            x, dt, dt_bias, A, B, C_boundary, gate, sums, packed, sizes, partial, length, channels, walk,
            x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), B.stride(0), B.stride(1), C_boundary.stride(0),
            0 if gate is None else gate.stride(0),
            N=A.shape[1], STATES=_padded(A.shape[1]), GATED=gate is not None, REDUCE=code,
            SERIES=series, EVEN=channels % STRIP == 0, CHUNK=CHUNK, STRIP=STRIP, FAST=fast, num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
        combine_strips[(triton.cdiv(length, 64), batch)](
            partial, scores, length, strips, REDUCE=code, STRIPS=16, TOKENS=64, FAST=fast, num_warps=4
        )  # fmt: skip
    return scores


@_impact.register_fake
def _(x, dt, dt_bias, A, B, C_boundary, gate, reduce, series):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def global_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.global_impact`; scores (B, L) in fp32 carry no gradient.

    Raises InputError for an unknown ``reduce``.
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce: must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    detached = (t.detach() for t in (x, dt, dt_bias, A, B, C_boundary))
    series = x.dtype in (torch.float16, torch.bfloat16)
    return _impact(*detached, None if gate is None else gate.detach(), reduce, series)
