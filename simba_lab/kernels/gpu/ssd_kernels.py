"""The scan of Mamba-2 (SSD) in Triton, forward: chunks of tokens as matrix products (Dao & Gu 2024, section 6).

Inside a chunk the outputs are ``(L * C B^T) (delta x)`` with L[t, s] the decay from s to t; what lies before the chunk
enters through the state. One program walks the chunks of one head with the state in registers, so that nothing but x,
B, C and the output passes through memory. B and C, which all heads of a group read, come from the cache.

The decay from s to t is 2 to a difference of running sums. A long run of large steps would leave a difference of fp32
sums without digits where the small steps behind it need them, so each sum is kept as two fp32 numbers that together
hold fp64's: ``high``, the sum rounded, and ``low``, what rounding lost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import LOG2E, exp2, softplus


@triton.jit
def step_sums(
    dt, dt_bias, A, delta, high, low, length, heads, padded, dt_batch, dt_token, dt_head,
    CHUNK: tl.constexpr, HEADS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """``delta`` (B, H, padded) and the sums of ``delta A / ln 2`` from the start of each chunk, the token's included.

    Steps of tokens that do not exist are 0, so that nothing behind the last token changes a state.
    """
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    live = h < heads
    inside = (t < length)[:, None] & live[None, :]
    bias = tl.load(dt_bias + h, live, 0.0).to(tl.float32)
    rate = tl.load(A + h, live, 0.0).to(tl.float64) * LOG2E
    raw = tl.load(dt + batch * dt_batch + t.to(tl.int64)[:, None] * dt_token + h[None, :] * dt_head, inside, 0.0)
    steps = tl.where(inside, softplus(raw.to(tl.float32) + bias[None, :], FAST), 0.0)
    sums = tl.cumsum(steps.to(tl.float64) * rate[None, :], 0)
    rounded = sums.to(tl.float32)
    at = (batch * heads + h)[None, :] * padded + t[:, None]
    tl.store(delta + at, steps, live[None, :])
    tl.store(high + at, rounded, live[None, :])
    tl.store(low + at, (sums - rounded.to(tl.float64)).to(tl.float32), live[None, :])


@triton.jit
def tile(pointer, rows, columns, stride, length, width):
    """(rows, columns) of a matrix (L, D) with contiguous columns, zeros outside."""
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    return tl.load(pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, 0.0)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """``total + a b`` in fp32. Triton's interpreter multiplies the bits of bf16 numbers, so it gets fp32 ones."""
    if FAST:
        return tl.dot(a, b, total, input_precision=PRECISION)
    return total + tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def decays(high, low, CHUNK: tl.constexpr, FAST: tl.constexpr):
    """(CHUNK, CHUNK): the decay from column s to row t, 0 for s > t."""
    i = tl.arange(0, CHUNK)
    gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return exp2(tl.where(i[:, None] >= i[None, :], gap, float("-inf")), FAST)


@triton.jit
def walk_states(
    values, vectors, delta, high, low, first, slots, last, heads, groups, length, padded, chunks, every,
    values_batch, values_token, values_head, vectors_batch, vectors_token, vectors_group,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``slots`` (B H, slots, N, P): the state before every ``every``-th chunk, starting from ``first`` (B, H, P, N).

    In REVERSE the gradients of the states: ``values`` are then those of the output, ``vectors`` C, the walk goes from
    the last chunk to the first, a slot holds the gradient of the state *behind* its chunk, and ``last`` (B, H, P, N)
    that of the state before the first one. A program owns some channels and some states of one head.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, (row % heads).to(tl.int32)
    n = tl.program_id(1) * STATES + tl.arange(0, STATES)
    p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    i = tl.arange(0, CHUNK)
    cell = (n < N)[:, None] & (p < P)[None, :]
    state_at = p[None, :] * N + n[:, None]
    slots += row * tl.cdiv(chunks, every) * N * P
    values += batch * values_batch + head * values_head
    vectors += batch * vectors_batch + head // (heads // groups) * vectors_group
    h = tl.zeros((STATES, WIDTH), tl.float32)
    if first is not None:
        h += tl.load(first + row * P * N + state_at, cell, 0.0).to(tl.float32)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - step if REVERSE else step
        if chunk % every == 0:
            slot = slots + (chunk // every).to(tl.int64) * N * P
            tl.store(slot + (n[:, None] * P + p[None, :]), h.to(slots.dtype.element_ty), cell)
        t = chunk * CHUNK + i
        V = tile(vectors, t, n, vectors_token, length, N)
        X = tile(values, t, p, values_token, length, P)
        at = row * padded + t
        sums = tl.load(high + at)
        total = tl.load(high + row * padded + chunk * CHUNK + CHUNK - 1)
        if REVERSE:
            weight = exp2(sums, FAST)
        else:
            rest = tl.load(low + row * padded + chunk * CHUNK + CHUNK - 1) - tl.load(low + at)
            weight = exp2((total - sums) + rest, FAST) * tl.load(delta + at)
        weighted = (X.to(tl.float32) * weight[:, None]).to(X.dtype)
        h = product(tl.trans(V), weighted, h * exp2(total, FAST), PRECISION, FAST)
    if last is not None:
        tl.store(last + row * P * N + state_at, h, cell)


@triton.jit
def scan_chunks(
    x, delta, high, low, B, C, D, initial, slots, out, final, heads, groups, length, padded, span, segments,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``out`` (B, L, H, P) and ``final`` (B, H, P, N); a program does ``span`` tokens of some channels of one head.

    ``slots`` (B H, segments, N, P) holds the states at the starts of the segments, if there are several.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, (row % heads).to(tl.int32)
    group = head // (heads // groups)
    segment = tl.program_id(1)
    begin, end = segment * span, tl.minimum(segment * span + span, length)
    n, i = tl.arange(0, STATES), tl.arange(0, CHUNK)
    p = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    cell = (n < N)[:, None] & (p < P)[None, :]
    state_at = p[None, :] * N + n[:, None]
    h = tl.zeros((STATES, WIDTH), tl.float32)
    if slots is not None:
        h += tl.load(slots + (row * segments + segment) * N * P + (n[:, None] * P + p[None, :]), cell, 0.0)
    elif initial is not None:
        h += tl.load(initial + row * P * N + state_at, cell, 0.0).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    x += batch * x_batch + head * x_head
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    out += batch * length * heads * P + head * P
    for start in tl.range(begin, end, CHUNK, num_stages=STAGES):
        t = start + i
        X = tile(x, t, p, x_token, length, P)
        B_t, C_t = tile(B, t, n, B_token, length, N), tile(C, t, n, C_token, length, N)
        at = row * padded + t
        steps, sums, rests = tl.load(delta + at), tl.load(high + at), tl.load(low + at)
        total = tl.load(high + row * padded + start + CHUNK - 1)
        rest = tl.load(low + row * padded + start + CHUNK - 1)
        scores = product(C_t, tl.trans(B_t), tl.zeros((CHUNK, CHUNK), tl.float32), PRECISION, FAST)
        weights = (scores * decays(sums, rests, CHUNK, FAST) * steps[None, :]).to(X.dtype)
        y = product(C_t, h.to(X.dtype), tl.zeros((CHUNK, WIDTH), tl.float32), PRECISION, FAST)
        y = product(weights, X, y * exp2(sums, FAST)[:, None], PRECISION, FAST)
        y += skip * X.to(tl.float32)
        inside = (t < length)[:, None] & (p < P)[None, :]
        tl.store(out + t.to(tl.int64)[:, None] * (heads * P) + p[None, :], y.to(out.dtype.element_ty), inside)
        left = exp2((total - sums) + (rest - rests), FAST) * steps
        weighted = (X.to(tl.float32) * left[:, None]).to(X.dtype)
        h = product(tl.trans(B_t), weighted, h * exp2(total, FAST), PRECISION, FAST)
    tl.store(final + row * P * N + state_at, h, cell & (end == length))
