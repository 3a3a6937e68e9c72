"""Global impact of every token on the boundary of a Mamba-2 layer, in Triton (Simba; design page, section 3).

With A one number per head, what token t adds to channel (h, p) factorises into ``(C_b . B_t) exp(A_h S_t) delta_t``
and ``x_t[h, p]``, where S_t is the sum of the head's steps behind t. The running sums are those of the scan, chunk by
chunk; a small kernel adds up the chunks behind each chunk; the last one reads x once and reduces over all channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu import launch
from simba_lab.kernels.gpu.elementary import exp2
from simba_lab.kernels.gpu.impact import REDUCTIONS
from simba_lab.kernels.gpu.impact_kernels import larger
from simba_lab.kernels.gpu.ssd_scan import StepSums

CHUNK, TOKENS = 64, 16
_MAX, _ABSMAX, _L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sum_later(high, low, later, padded, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """``later`` (B H, chunks): ``delta A / ln 2`` summed over all chunks behind a chunk, in fp64 until it is stored."""
    row = tl.program_id(0).to(tl.int64)
    carried = tl.zeros((), tl.float64)
    for step in range(0, tl.cdiv(chunks, BLOCK)):
        chunk = chunks - 1 - step * BLOCK - tl.arange(0, BLOCK)
        last, live = row * padded + chunk * CHUNK + CHUNK - 1, chunk >= 0
        sums = tl.load(high + last, live, 0.0).to(tl.float64) + tl.load(low + last, live, 0.0).to(tl.float64)
        behind = tl.cumsum(sums, 0) - sums + carried
        tl.store(later + row * chunks + chunk, behind.to(tl.float32), live)
        carried += tl.sum(sums, 0)


@triton.jit
def reduce_impacts(
    x, delta, high, low, later, B, C, gate, scores, heads, groups, length, padded, chunks,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_group,
    P: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
    TOKENS: tl.constexpr, REDUCE: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``scores`` (B, L); ``C`` (B, G, N) is the boundary's, ``gate`` (B, H P) a weight per channel or None."""
    parts = CHUNK // TOKENS
    batch = (tl.program_id(0) // (chunks * parts)).to(tl.int64)
    part = tl.program_id(0) % (chunks * parts)
    chunk = part // parts
    t, p, n = part * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH), tl.arange(0, STATES)
    exists = t < length
    cell = exists[:, None] & (p < P)[None, :]
    best = tl.full((TOKENS, WIDTH), 0.0 if REDUCE == _L2 else float("-inf"), tl.float32)
    for group in range(0, groups):
        C_n = tl.load(C + batch * C_batch + group * C_group + n, n < N, 0.0).to(tl.float32)
        B_at = B + batch * B_batch + group * B_group + t.to(tl.int64)[:, None] * B_token + n[None, :]
        B_t = tl.load(B_at, exists[:, None] & (n < N)[None, :], 0.0).to(tl.float32)
        match = tl.sum(B_t * C_n[None, :], 1)
        for one in tl.range(0, heads // groups, num_stages=STAGES):
            head = group * (heads // groups) + one
            row = batch * heads + head
            end = row * padded + chunk * CHUNK + CHUNK - 1
            at = row * padded + t
            behind = (tl.load(high + end) - tl.load(high + at)) + (tl.load(low + end) - tl.load(low + at))
            factor = match * exp2(behind + tl.load(later + row * chunks + chunk), FAST) * tl.load(delta + at)
            x_at = x + batch * x_batch + head * x_head + t.to(tl.int64)[:, None] * x_token + p[None, :]
            impact = tl.load(x_at, cell, 0.0).to(tl.float32) * factor[:, None]
            if gate is not None:
                impact *= tl.load(gate + (batch * heads + head) * P + p, p < P, 0.0).to(tl.float32)[None, :]
            if REDUCE == _L2:
                best += impact * impact
            elif REDUCE == _ABSMAX:
                best = larger(best, tl.abs(impact))
            else:
                best = larger(best, tl.where((p < P)[None, :], impact, float("-inf")))
    if REDUCE == _L2:
        score = tl.sqrt(tl.sum(best, 1))
    else:
        score = tl.reduce(best, 1, larger)
    tl.store(scores + batch * length + t, score, exists)


@torch.library.custom_op("simba_lab::ssd_impact_triton", mutates_args=())
def _impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None, reduce: str
) -> Tensor:
    (batch, length, heads, width), (groups, n) = x.shape, B.shape[2:]
    scores = x.new_empty(batch, length, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    x, B, C = map(launch.last_contiguous, (x, B, C_boundary))
    gate = None if gate is None else gate.contiguous()
    chunks = triton.cdiv(length, CHUNK)
    later = scores.new_empty(batch, heads, chunks)
    with torch.cuda.device_of(x):
        sums = StepSums.of(dt, dt_bias, A, CHUNK)
        sum_later[(batch * heads,)](
            sums.high, sums.low, later, chunks * CHUNK, chunks, CHUNK=CHUNK, BLOCK=256, num_warps=1
        )
        reduce_impacts[(batch * chunks * (CHUNK // TOKENS),)](
            x, *sums.operands(), later, B, C, gate, scores, heads, groups, length, chunks * CHUNK, chunks,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:2],
            P=width, N=n, WIDTH=triton.next_power_of_2(width), STATES=triton.next_power_of_2(n), CHUNK=CHUNK,
            TOKENS=TOKENS, REDUCE=REDUCTIONS.index(reduce), FAST=launch.on_gpu(x), STAGES=4, num_warps=2,
        )  # fmt: skip
    return scores


@_impact.register_fake
def _(x, dt, dt_bias, A, B, C_boundary, gate, reduce):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def ssd_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd_impact`; scores (B, L) in fp32 carry no gradient.

    Raises InputError for an unknown ``reduce``.
    """
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce: must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    detached = (t.detach() for t in (x, dt, dt_bias, A, B, C_boundary))
    return _impact(*detached, None if gate is None else gate.detach(), reduce)
