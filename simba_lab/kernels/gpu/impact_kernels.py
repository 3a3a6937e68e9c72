"""Global impact of every token on the boundary, in Triton (Simba; design page, section 3).

One program owns a strip of channels and walks a stretch of the sequence towards its start, a chunk of tokens at a time,
carrying the sum S of the steps after the chunk. Nothing of size (length, channel, state) exists, and x and dt are read
once. Where a sequence alone would leave the GPU idle it is cut into stretches; a first kernel then sums the steps of
every chunk of the later stretches (dt is read twice there). Partial results per strip are reduced by a last kernel.

The 16 exponentials for every token and channel would cost more than everything else. For fp16 and bf16 input they are
replaced, chunk by chunk, by their Taylor series around S_mid, the middle of the chunk, with u = S_t - S_mid:

    sum_n w_t[n] exp(A_n S_t) = sum_k u^k sum_n w_t[n] (A_n^k / k! exp(A_n S_mid)),   w_t[n] = C_b[n] B_t[n]

whose inner sums are matrix products (tokens x states) (states x channels). A fast state has vanished before its series
fails: cut off after u^5, the error relative to a decay of 1 depends, for *any* rate A_n, only on the chunk's share q of
the sum at its middle, total / S_mid. It is at most 4.2e-4 for q = ``MAX_SHARE`` and 5.5e-6 for half of that; with equal
steps the second chunk from the boundary has q = 2 / 3, the third 0.4. Chunks with a larger share, like that next to the
boundary, and all of fp32 input take the exponentials. The choice looks at one strip of one sequence only, so that
no other sequence of a batch can change a score.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import LN2, LOG2E, exp2, pin, reciprocal, softplus

MAX_SHARE = tl.constexpr(0.7)
LEAST_EXPONENT = tl.constexpr(-1.0)
"""No decay over half a chunk falls below 2 to this power: the series is then exact to 9e-5, whatever the share."""
LARGEST_TERM = tl.constexpr(8.0)
_MAX, _ABSMAX, _L2 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp2_below(v, FAST: tl.constexpr):
    """2^-|v|."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; abs.f32 t, $1; neg.f32 t, t; ex2.approx.ftz.f32 $0, t; }", "=r,r", [v], tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    return tl.exp2(-tl.abs(v))


@triton.jit
def _steps(raw, bias, ROUGH: tl.constexpr, FAST: tl.constexpr):
    """delta / ln 2, in which units exp(A delta) is a power of two; ``raw`` is dt (tokens, channels).

    ``bias`` is dt_bias, divided by ln 2 as well if ROUGH.
    """
    raw = raw.to(tl.float32)
    if not ROUGH:
        return softplus(raw + bias[None, :], FAST) * LOG2E
    v = raw * LOG2E + bias[None, :]
    e = _exp2_below(v, FAST)
    # log2(1 + e) / e: minimax over [0, 1], relative error below 9e-6, without a second special function.
    p = -0.0344358869 * e + 0.146032855
    p = p * e - 0.303036213
    p = p * e + 0.469174087
    p = p * e - 0.720426142
    p = p * e + 1.44268286
    return p * e + tl.maximum(v, 0.0)


@triton.jit
def sum_steps(
    dt, dt_bias, sums, length, channels, dt_batch, dt_token,
    ROUGH: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """``sums`` (B, chunks, D): sum of delta / ln 2 over every chunk, counted from the boundary and all full."""
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    token = length - (chunk + 1) * CHUNK + tl.arange(0, CHUNK)
    live = channel < channels
    bias = tl.load(dt_bias + channel, mask=live, other=0).to(tl.float32) * (LOG2E if ROUGH else 1.0)
    at = batch * dt_batch + token.to(tl.int64)[:, None] * dt_token + channel[None, :]
    delta = _steps(tl.load(dt + at, mask=live[None, :], other=0), bias, ROUGH, FAST)
    row = batch * tl.num_programs(1) + chunk
    tl.store(sums + row * channels + channel, tl.sum(delta, 0), mask=live)


@triton.jit
def _sum_rows(rows, end, channel, live, channels, ROWS: tl.constexpr, STRIP: tl.constexpr):
    """Sum of the first ``end`` rows of a matrix (chunks, D)."""
    total = tl.zeros((STRIP,), tl.float32)
    for start in range(0, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & live[None, :]
        total += tl.sum(tl.load(rows + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=mask, other=0), 0)
    return total


@triton.jit
def pack_weights(
    B, C, packed, size, length, B_batch, B_token, C_batch,
    N: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """w_t[n] = C_b[n] B_t[n] as ``size`` (B, L), the largest of a token, times ``packed`` (B, L, 2, STATES), fp16.

    Two parts of fp16 together hold 22 bits.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    n = tl.arange(0, STATES)
    exists = token < length
    C_n = tl.load(C + batch * C_batch + n, mask=n < N, other=0).to(tl.float32)
    at = B + batch * B_batch + token.to(tl.int64)[:, None] * B_token + n[None, :]
    w = tl.load(at, mask=exists[:, None] & (n < N)[None, :], other=0).to(tl.float32) * C_n[None, :]
    largest = tl.max(tl.abs(w), 1)
    w *= reciprocal(tl.maximum(largest, 1e-30), FAST)[:, None]
    high = w.to(tl.float16)
    row = batch * length + token
    tl.store(size + row, largest, mask=exists)
    at = packed + row[:, None] * (2 * STATES) + n[None, :]
    tl.store(at, high, mask=exists[:, None])
    tl.store(at + STATES, (w - high.to(tl.float32)).to(tl.float16), mask=exists[:, None])


@triton.jit
def _by_exponentials(
    later, A, B, C, offsets, exists, channel, live,
    N: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """sum_n w_t[n] 2^(A_n later_t), (tokens, channels)."""
    total = tl.zeros((CHUNK, STRIP), tl.float32)
    for n in range(N):
        rate = tl.load(A + channel * N + n, mask=live, other=0).to(tl.float32)
        weight = tl.load(B + offsets + n, mask=exists, other=0).to(tl.float32) * tl.load(C + n).to(tl.float32)
        total += exp2(later * rate[None, :], FAST) * weight[:, None]
    return total


@triton.jit
def _by_series(later, half, mid, rates, slowest, w_high, w_low, FAST: tl.constexpr):
    """The same as matrix products, to be multiplied by the weights' size (tokens,) and the decays' size (channels,).

    ``later`` within the chunk, ``half`` its half range, ``mid`` its middle, ``rates`` (states, channels). Operands are
    fp16; for its range weights are scaled by the token's largest, decays by the channel's slowest.
    """
    decay = exp2((rates - slowest[None, :]) * mid[None, :], FAST)
    # A term this large stands beside a decay of 0, but must not be infinite: 0 times infinity is NaN.
    step = tl.maximum(rates * (half * LN2)[None, :], -LARGEST_TERM)
    u = later * reciprocal(tl.maximum(half, 1e-30), FAST)[None, :] - 1.0
    linear = decay * step
    quadratic = linear * (step * 0.5)
    cubic = quadratic * (step * 0.3333333333333333)
    quartic = cubic * (step * 0.25)
    total = tl.dot(w_high, (quartic * (step * 0.2)).to(tl.float16))
    total = tl.dot(w_high, quartic.to(tl.float16), acc=total * u)
    total = tl.dot(w_high, cubic.to(tl.float16), acc=total * u)
    total = tl.dot(w_high, quadratic.to(tl.float16), acc=total * u)
    total = tl.dot(w_high, linear.to(tl.float16), acc=total * u)
    decay_high = decay.to(tl.float16)
    total = tl.dot(w_high, decay_high, acc=total * u)
    total = tl.dot(w_high, (decay - decay_high.to(tl.float32)).to(tl.float16), acc=total)
    return tl.dot(w_low, decay_high, acc=total)


@triton.jit
def _reduced(values, AXIS: tl.constexpr, REDUCE: tl.constexpr, FAST: tl.constexpr):
    """Sum or maximum; a NaN stays one: a score that hides it would be trusted."""
    if REDUCE == _L2:
        return tl.sum(values, AXIS)
    if FAST:
        return tl.reduce(values, AXIS, larger)
    return tl.max(values, AXIS, return_indices=True)[0]  # in the interpreter this maximum keeps NaN, and is much faster


@triton.jit
def _row_scores(impact, REDUCE: tl.constexpr, FAST: tl.constexpr):
    """Reduction over the channels of a strip, before the root of L2."""
    if REDUCE == _L2:
        impact *= impact
    if REDUCE == _ABSMAX:
        impact = tl.abs(impact)
    return _reduced(impact, 1, REDUCE, FAST)


@triton.jit
def walk_chunks(
    x, dt, dt_bias, A, B, C, gate, sums, packed, sizes, partial, length, channels, walk,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, gate_batch,
    N: tl.constexpr, STATES: tl.constexpr, GATED: tl.constexpr, REDUCE: tl.constexpr, SERIES: tl.constexpr,
    EVEN: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """``partial`` (B, strips, L): reduction over one strip of channels, away from the boundary chunk by chunk.

    Chunks count from the boundary, so that only the last one can be short: what its missing tokens hold reaches no sum
    that is used. EVEN: the strip has no missing channels.
    """
    strip, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * walk
    end = tl.minimum(first + walk, tl.cdiv(length, CHUNK))
    channel = strip * STRIP + tl.arange(0, STRIP)
    live = channel < channels
    bias = tl.load(dt_bias + channel, mask=live, other=0).to(tl.float32) * (LOG2E if SERIES else 1.0)
    weight = tl.full((STRIP,), LN2, tl.float32)
    if GATED:
        weight *= tl.load(gate + batch * gate_batch + channel, mask=live, other=0).to(tl.float32)
    floor = tl.zeros((STRIP,), tl.float32)
    if REDUCE == _MAX:
        floor = tl.where(live, 0.0, float("-inf"))  # an impact of 0 where there is no channel could be the largest
    n = tl.arange(0, STATES)
    C += batch * C_batch
    if SERIES:
        known = (n < N)[:, None] & live[None, :]
        rates = tl.load(A + channel[None, :] * N + n[:, None], mask=known, other=float("-inf")).to(tl.float32)
        slowest = tl.where(live, tl.max(rates, 0), 0.0)
        rates = tl.where(known, rates, slowest[None, :])
        fastest = tl.min(rates, 0)
        # Row t holds 1 for every later token of the chunk: sums of steps are a matrix product too.
        triangle = (tl.arange(0, CHUNK)[:, None] < tl.arange(0, CHUNK)[None, :]).to(tl.float16)
    carry = _sum_rows(
        sums + batch * (tl.num_programs(1) - 1) * walk * channels, first, channel, live, channels, 32, STRIP
    )
    partial += (batch * tl.num_programs(0) + strip) * length
    x += batch * x_batch + strip * STRIP
    dt += batch * dt_batch + strip * STRIP
    column = tl.arange(0, STRIP)
    for chunk in range(first, end):
        token = length - (chunk + 1) * CHUNK + tl.arange(0, CHUNK)
        exists = token >= 0
        inside = exists[:, None] if EVEN else exists[:, None] & live[None, :]
        place = token.to(tl.int64)
        raw = tl.load(dt + place[:, None] * dt_token + column[None, :], mask=inside, other=0)
        x_t = tl.load(x + place[:, None] * x_token + column[None, :], mask=inside, other=0)
        delta = _steps(raw, bias, SERIES, FAST)
        if SERIES and FAST:
            delta = pin(delta, CHUNK, STRIP)  # wanted in two layouts: its softplus must not be computed in both
        drive = x_t.to(tl.float32) * delta
        total = tl.sum(delta, 0)
        B_at = batch * B_batch + place * B_token
        if SERIES:
            high = delta.to(tl.float16)
            later = tl.dot(triangle, high)
            half = 0.5 * total
            mid = carry + half
            hard = (total > mid * MAX_SHARE) & (fastest * half < LEAST_EXPONENT)
            if tl.max(hard.to(tl.int32), 0) > 0:
                low = (delta - high.to(tl.float32)).to(tl.float16)
                later = tl.dot(triangle, low, acc=later) + carry[None, :]
                impact = _by_exponentials(later, A, B, C, B_at, exists, channel, live, N, CHUNK, STRIP, FAST)
                score = _row_scores(impact * (drive * weight[None, :]) + floor[None, :], REDUCE, FAST)
            else:
                w_at = packed + (batch * length + place)[:, None] * (2 * STATES) + n[None, :]
                w_high = tl.load(w_at, mask=exists[:, None], other=0)
                w_low = tl.load(w_at + STATES, mask=exists[:, None], other=0)
                impact = _by_series(later, half, mid, rates, slowest, w_high, w_low, FAST)
                impact *= drive * (weight * exp2(slowest * mid, FAST))[None, :]
                score = _row_scores(impact + floor[None, :], REDUCE, FAST)
                size = tl.load(sizes + batch * length + place, mask=exists, other=0)
                score *= size * size if REDUCE == _L2 else size
        else:
            later = carry[None, :] + (tl.cumsum(delta, 0, reverse=True) - delta)
            impact = _by_exponentials(later, A, B, C, B_at, exists, channel, live, N, CHUNK, STRIP, FAST)
            score = _row_scores(impact * (drive * weight[None, :]) + floor[None, :], REDUCE, FAST)
        tl.store(partial + token, score, mask=exists)
        carry += total


@triton.jit
def combine_strips(
    partial, scores, length, strips,
    REDUCE: tl.constexpr, STRIPS: tl.constexpr, TOKENS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores (B, L) of ``partial`` (B, strips, L), in an order that depends on nothing but the number of strips."""
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    exists = token < length
    nothing = 0.0 if REDUCE == _L2 else float("-inf")
    result = tl.full((TOKENS,), nothing, tl.float32)
    for first in range(0, strips, STRIPS):
        strip = first + tl.arange(0, STRIPS)
        at = partial + (batch * strips + strip)[:, None] * length + token[None, :]
        values = tl.load(at, mask=(strip < strips)[:, None] & exists[None, :], other=nothing)
        block = _reduced(values, 0, REDUCE, FAST)
        result = result + block if REDUCE == _L2 else larger(result, block)
    if REDUCE == _L2:
        result = tl.sqrt(result)
    tl.store(scores + batch * length + token, result, mask=exists)
