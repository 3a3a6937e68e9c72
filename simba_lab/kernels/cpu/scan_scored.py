"""The selective scan that scores the tokens of the context by their global impact on its way; for CPUs, by Numba.

The impact of a token takes the decays of all tokens between it and the boundary, which the scan computes anyway. So a
few states' decays are kept until they have passed a chunk, and are then multiplied together backwards: two operations
for each, where :mod:`simba_lab.kernels.cpu.impact` computes a power of two. Powers are taken here only from the
boundary to the end of a chunk, of sums of steps made beforehand.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, move, put, unset, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, larger, softplus
from simba_lab.kernels.cpu.impact import MAX, fold, reduce_lanes
from simba_lab.kernels.cpu.scan_forward import (
    CHUNK,
    TOGETHER,
    advance,
    fetch_states,
    gate,
    load_state,
    padded,
    put_state,
)
from simba_lab.kernels.cpu.vectors import LANES, all_at_most, entry, load, store

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _all_steps(dt, at, stride, length, used, bias_block, present, one, dt_c, delta, sums):
    """``delta`` (length, WIDTH), the steps of all tokens; ``sums`` (chunks, WIDTH), of those after each chunk.

    Only the ``present`` tokens of the context count for the sums.
    """
    later = zeros(1, delta.dtype)
    for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
        steps = min(CHUNK, length - t0)
        fetch(dt, at + t0 * stride, stride, steps, used, -CHUNK, dt_c)
        for d in range(0, WIDTH, LANES):
            bias, after = load(bias_block, d), load(later, d)
            store(sums, t0 // CHUNK * WIDTH + d, after)
            for k in range(steps - 1, -1, -1):
                step = softplus(load(dt_c, k * WIDTH + d) + bias, one)
                store(delta, (t0 + k) * WIDTH + d, step)
                if t0 + k < present:
                    after += step
            store(later, d, after)


@_inner
def _multiply(delta, at_delta, x_c, D_block, steps, u_c, y_c):
    """Products of steps and x, and the skip connection in ``y_c``."""
    for d in range(0, WIDTH, LANES):
        skip = load(D_block, d)
        for at in range(d, steps * WIDTH, WIDTH):
            x = load(x_c, at)
            store(u_c, at, load(delta, at_delta + at) * x)
            store(y_c, at, skip * x)


@_inner
def _from_boundary(later, rates, n, d, least):
    """Decays of state n from the boundary to a place ``later`` before it; exactly 0 for those that count as 0."""
    return larger(exp2(later * load(rates, n * WIDTH + d)) - least, later - later)


@_inner
def _look_back(later, rates, d, n, vanished, least, weights_c, count, decays, impact_c):
    """Adds to ``impact_c`` (count, LANES) the decays to the boundary of ``TOGETHER`` states from ``n`` on, weighted.

    For ``count`` tokens; ``later`` are the sums of the steps after them.
    """
    states, gone = rates.size // WIDTH, True
    for m in range(n, n + TOGETHER):
        gone = gone and all_at_most(later * load(rates, m * WIDTH + d), vanished)
    if gone:
        return
    p0, p1 = _from_boundary(later, rates, n, d, least), _from_boundary(later, rates, n + 1, d, least)
    p2, p3 = _from_boundary(later, rates, n + 2, d, least), _from_boundary(later, rates, n + 3, d, least)
    for k in range(count - 1, -1, -1):
        w, at = k * states + n, k * TOGETHER * LANES
        impact = load(impact_c, k * LANES) + p0 * entry(weights_c, w) + p1 * entry(weights_c, w + 1)
        store(impact_c, k * LANES, impact + p2 * entry(weights_c, w + 2) + p3 * entry(weights_c, w + 3))
        p0, p1 = p0 * load(decays, at), p1 * load(decays, at + LANES)
        p2, p3 = p2 * load(decays, at + 2 * LANES), p3 * load(decays, at + 3 * LANES)


@_inner
def _fold(impact_c, u_c, d, weight, used, count, reduce, found_c):
    """What a token leaves, times its decays, into ``found_c`` (count, LANES); ``impact_c`` is 0 again after that."""
    for k in range(count):
        store(impact_c, k * LANES, load(impact_c, k * LANES) * load(u_c, k * WIDTH + d) * weight)
    if reduce == MAX:  # lanes that are no channels hold 0, which may not be the maximum
        for lane in range(used - d, LANES):
            impact_c[lane : count * LANES : LANES] = impact_c[0 : count * LANES : LANES]
    fold(impact_c, count, reduce, found_c)
    impact_c[:] = 0


@_inner
def _job(
    x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, weights, channel_weights, present, reduce,
    vanished, best, i, block, to,
):  # fmt: skip
    (channels, states), dtype = A.shape, out.dtype
    length = out.size // (final.shape[0] * channels)
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one, least = dtype.type(1), exp2(vanished)
    rates, h = load_rates(A, first, used, dtype, WIDTH, padded(states)), zeros(padded(states), dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    weight_block = load_channels(channel_weights[i], first, used, dtype)
    B_c, C_c = zeros(CHUNK, dtype, padded(states)), zeros(CHUNK, dtype, padded(states))
    weights_c = zeros(CHUNK, dtype, padded(states))
    x_c, z_c, u_c, y_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    impact_c, found_c = zeros(CHUNK, dtype, LANES), zeros(CHUNK, dtype, LANES)
    decays, delta = zeros(CHUNK * TOGETHER, dtype, LANES), unset(length, dtype)
    sums = zeros(-(-length // CHUNK), dtype)
    at_dt = i * strides[1, 0] + first
    _all_steps(dt, at_dt, strides[1, 1], length, used, bias_block, present, one, x_c, delta, sums)
    load_state(initial, i, first, used, h)
    for t0 in range(0, length, CHUNK):
        steps, count = min(CHUNK, length - t0), min(CHUNK, present - t0)
        if starts.shape[1] > 0:
            starts[i, t0 // CHUNK, block] = h[: states * WIDTH]
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, CHUNK, x_c)
        fetch(z, i * strides[4, 0] + t0 * strides[4, 1] + first, strides[4, 1], steps, used, CHUNK, z_c)
        fetch_states(B, i * strides[2, 0] + t0 * strides[2, 1], strides[2, 1], steps, states, B_c)
        fetch_states(C, i * strides[3, 0] + t0 * strides[3, 1], strides[3, 1], steps, states, C_c)
        if count > 0:
            move(weights, (i * present + t0) * padded(states), count * padded(states), weights_c, 0)
        _multiply(delta, t0 * WIDTH, x_c, D_block, steps, u_c, y_c)
        found_c[:] = -np.inf if reduce == MAX else 0
        for d in range(0, WIDTH, LANES):
            later = load(sums, t0 // CHUNK * WIDTH + d)
            for n in range(0, padded(states), TOGETHER):
                advance(h, rates, d, n, delta, t0 * WIDTH, u_c, B_c, C_c, steps, y_c, decays)
                if count > 0 and d < used:
                    _look_back(later, rates, d, n, vanished, least, weights_c, count, decays, impact_c)
            if count > 0 and d < used:
                _fold(impact_c, u_c, d, load(weight_block, d), used, count, reduce, found_c)
        gate(z_c, one, steps, y_c)
        put(y_c, out, (i * length + t0) * channels + first, channels, steps, used)
        if count > 0:
            reduce_lanes(found_c, count, reduce, best, to + t0)
    put_state(h, final, i, first, used)


@kernel
def forward(
    x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, weights, channel_weights, present, reduce,
    vanished, best,
):  # fmt: skip
    """:func:`simba_lab.kernels.cpu.scan_forward.forward`, and the scores of the first ``present`` tokens.

    ``best`` (B blocks present,), weights (B present padded N,), channel weights (B, D), ``reduce`` and ``vanished`` as
    in :func:`simba_lab.kernels.cpu.impact.scores`, with blocks of ``WIDTH`` channels.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(final.shape[0] * blocks):
        before = flush_denormals()
        _job(
            x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, weights, channel_weights, present,
            reduce, vanished, best, job // blocks, job % blocks, job * present,
        )  # fmt: skip
        restore_denormals(before)
