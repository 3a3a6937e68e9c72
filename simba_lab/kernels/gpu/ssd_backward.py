"""Gradients of the scan of Mamba-2 (SSD) in Triton: every chunk by itself, once the states around it are known.

Symbols as in :mod:`simba_lab.kernels.reference`; ``h`` is the state before a chunk, ``dh`` the gradient of the state
behind it. What belongs to one head, :func:`head_gradients` finds head by head; the gradients of B and C, which the
heads of a group share, are added up over heads by :func:`vector_gradients`.

The gradient of ``delta A`` at token r collects every path that crosses r, from a source before it to an output at or
behind it. Only such paths are ever added up: a difference of sums in which the others cancel would lose its digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import exp2
from simba_lab.kernels.gpu.ssd_kernels import decays, product, tile


@triton.jit
def _crossing(paths, ends, starts, CHUNK: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr):
    """(CHUNK,): at r, ``paths[t, s]`` over s < r <= t, ``ends[t]`` over t >= r and ``starts[s]`` over s < r, summed."""
    i = tl.arange(0, CHUNK)
    earlier = i[:, None] < i[None, :]
    ends = tl.broadcast_to(ends[:, None], (CHUNK, CHUNK))
    ends = product(paths, earlier.to(paths.dtype), ends, PRECISION, FAST)
    return tl.sum(tl.where(earlier, starts[:, None], ends), 0)


@triton.jit
def head_gradients(
    x, dout, delta, high, low, B, C, D, states, dstates, dx, direct, dlogs, dD,
    heads, groups, length, padded, chunks,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A program takes one chunk of one head and walks over its states, ``STATES`` at a time.

    ``states``, ``dstates`` (B H, chunks, N, P): h and dh. Written: ``dx`` (B, L, H, P); ``direct`` and ``dlogs``
    (B, H, padded), what reaches delta beside the decays, and the gradient of delta A; ``dD`` (B, H, chunks).
    """
    row, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    batch, head = row // heads, (row % heads).to(tl.int32)
    group = head // (heads // groups)
    i, p = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    t = chunk * CHUNK + i
    B += batch * B_batch + group * B_group
    C += batch * C_batch + group * C_group
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    entering, onward = tl.zeros((CHUNK, WIDTH), tl.float32), tl.zeros((CHUNK, WIDTH), tl.float32)
    across = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, N, STATES):
        n = first + tl.arange(0, STATES)
        cell = (n < N)[:, None] & (p < P)[None, :]
        state, state_at = (row * chunks + chunk) * N * P, n[:, None] * P + p[None, :]
        h = tl.load(states + state + state_at, cell, 0.0)
        dh = tl.load(dstates + state + state_at, cell, 0.0)
        B_t, C_t = tile(B, t, n, B_token, length, N), tile(C, t, n, C_token, length, N)
        scores = product(C_t, tl.trans(B_t), scores, PRECISION, FAST)
        entering = product(C_t, h, entering, PRECISION, FAST)
        onward = product(B_t, dh, onward, PRECISION, FAST)
        across += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 0)
    X = tile(x + batch * x_batch + head * x_head, t, p, x_token, length, P)
    token_at = batch * length * heads * P + head * P
    dY = tile(dout + token_at, t, p, heads * P, length, P)
    wide, dwide = X.to(tl.float32), dY.to(tl.float32)
    at = row * padded + t
    steps, sums, rests = tl.load(delta + at), tl.load(high + at), tl.load(low + at)
    total = tl.load(high + row * padded + chunk * CHUNK + CHUNK - 1)
    rest = tl.load(low + row * padded + chunk * CHUNK + CHUNK - 1)
    weights = scores * decays(sums, rests, CHUNK, FAST)
    onward *= exp2((total - sums) + (rest - rests), FAST)[:, None]
    dstepped = product(tl.trans(weights.to(X.dtype)), dY, onward, PRECISION, FAST)
    skip = tl.load(D + head).to(tl.float32)
    inside = (t < length)[:, None] & (p < P)[None, :]
    dx_at = token_at + t.to(tl.int64)[:, None] * (heads * P) + p[None, :]
    tl.store(dx + dx_at, (dstepped * steps[:, None] + skip * dwide).to(dx.dtype.element_ty), inside)
    tl.store(direct + at, tl.sum(dstepped * wide, 1))
    tl.store(dD + row * chunks + chunk, tl.sum(tl.sum(dwide * wide, 1), 0))
    to_later = tl.sum(onward * wide, 1) * steps
    from_earlier = tl.sum(entering * dwide, 1) * exp2(sums, FAST)
    paths = product(dY, tl.trans(X), tl.zeros((CHUNK, CHUNK), tl.float32), PRECISION, FAST) * weights
    paths = tl.where(i[:, None] > i[None, :], paths * steps[None, :], 0.0)
    crossing = _crossing(paths, from_earlier, to_later, CHUNK, PRECISION, FAST)
    tl.store(dlogs + at, crossing + tl.sum(across, 0) * exp2(total, FAST))


@triton.jit
def vector_gradients(
    x, dout, delta, high, low, B, C, states, dstates, dB, dC, heads, groups, length, padded, chunks, share,
    x_batch, x_token, x_head, B_batch, B_token, B_group, C_batch, C_token, C_group,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr, STATES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``dB``, ``dC`` (B, shares of a group, L, G, N), to be added up over the shares, ``share`` heads each.

    A program takes one chunk, one share and ``STATES`` states.
    """
    batch, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    group, part, per_group = tl.program_id(1) % groups, tl.program_id(1) // groups, heads // groups
    i, p = tl.arange(0, CHUNK), tl.arange(0, WIDTH)
    n = tl.program_id(2) * STATES + tl.arange(0, STATES)
    t = chunk * CHUNK + i
    cell = (n < N)[:, None] & (p < P)[None, :]
    dscores = tl.zeros((CHUNK, CHUNK), tl.float32)
    dB_t, dC_t = tl.zeros((CHUNK, STATES), tl.float32), tl.zeros((CHUNK, STATES), tl.float32)
    x += batch * x_batch
    dout += batch * length * heads * P
    begin = group * per_group + part * share
    end = tl.minimum(begin + share, group * per_group + per_group)
    for head in tl.range(begin, end, num_stages=STAGES):
        row = batch * heads + head
        X = tile(x + head * x_head, t, p, x_token, length, P)
        dY = tile(dout + head * P, t, p, heads * P, length, P)
        state, state_at = (row * chunks + chunk) * N * P, n[:, None] * P + p[None, :]
        h = tl.load(states + state + state_at, cell, 0.0)
        dh = tl.load(dstates + state + state_at, cell, 0.0)
        at = row * padded + t
        steps, sums, rests = tl.load(delta + at), tl.load(high + at), tl.load(low + at)
        total = tl.load(high + row * padded + chunk * CHUNK + CHUNK - 1)
        rest = tl.load(low + row * padded + chunk * CHUNK + CHUNK - 1)
        spread = product(dY, tl.trans(X), tl.zeros((CHUNK, CHUNK), tl.float32), PRECISION, FAST)
        dscores += spread * decays(sums, rests, CHUNK, FAST) * steps[None, :]
        entered = (dY.to(tl.float32) * exp2(sums, FAST)[:, None]).to(X.dtype)
        dC_t = product(entered, tl.trans(h), dC_t, PRECISION, FAST)
        left = exp2((total - sums) + (rest - rests), FAST) * steps
        leaving = (X.to(tl.float32) * left[:, None]).to(X.dtype)
        dB_t = product(leaving, tl.trans(dh), dB_t, PRECISION, FAST)
    B_t = tile(B + batch * B_batch + group * B_group, t, n, B_token, length, N)
    C_t = tile(C + batch * C_batch + group * C_group, t, n, C_token, length, N)
    dscores = dscores.to(B_t.dtype)
    dC_t = product(dscores, B_t, dC_t, PRECISION, FAST)
    dB_t = product(tl.trans(dscores), C_t, dB_t, PRECISION, FAST)
    inside = (t < length)[:, None] & (n < N)[None, :]
    shares = tl.num_programs(1) // groups
    at = (batch * shares + part) * length * groups * N + group * N
    at += t.to(tl.int64)[:, None] * (groups * N) + n[None, :]
    tl.store(dB + at, dB_t, inside)
    tl.store(dC + at, dC_t, inside)
