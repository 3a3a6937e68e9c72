"""The selective scan that scores the tokens of the context by their global impact on its way; for CPUs, by Numba.

The impact of a token takes the decays of all tokens between it and the boundary, which the scan computes anyway. So
decays are kept until the scan has passed a few tokens, and are then multiplied together backwards: two operations for
each state, where :mod:`simba_lab.kernels.cpu.impact` computes a power of two. Powers are taken here only from the
boundary to the last of the few, of sums of steps made beforehand.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, put, unset, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, larger, softplus
from simba_lab.kernels.cpu.impact import MAX, fold, reduce_lanes
from simba_lab.kernels.cpu.scan import CHUNK, gate
from simba_lab.kernels.cpu.vectors import LANES, all_at_most, entry, load, store

FEW = 16
"""Tokens whose decays are kept at once; with 16 states they take half of a first-level cache."""
TOGETHER = 4
"""States that are multiplied side by side: each waits for its own last product."""

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _all_steps(dt, at, stride, length, used, bias_block, present, one, dt_c, delta, sums):
    """``delta`` (length, WIDTH), the steps of all tokens; ``sums`` (present / FEW, WIDTH), of all after every few.

    Only the ``present`` tokens of the context count for the sums.
    """
    later = zeros(1, delta.dtype)
    for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
        steps = min(CHUNK, length - t0)
        fetch(dt, at + t0 * stride, stride, steps, used, -CHUNK, dt_c)
        for d in range(0, WIDTH, LANES):
            bias, total = load(bias_block, d), load(later, d)
            for k in range(steps - 1, -1, -1):
                own = (t0 + k) * WIDTH + d
                step = softplus(load(dt_c, k * WIDTH + d) + bias, one)
                store(delta, own, step)
                if t0 + k < present:
                    if (k + 1) % FEW == 0 or t0 + k + 1 == present:
                        store(sums, (t0 + k) // FEW * WIDTH + d, total)
                    total += step
            store(later, d, total)


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
def _advance(h, rates, d, all_delta, at_delta, u_c, B, at_B, step_B, C, at_C, step_C, first, last, y_c, decays):
    """The scan's own over the tokens from ``first`` to ``last`` of a chunk and the lanes at ``d``.

    Keeps their ``decays`` (last - first, N, LANES). ``at_B`` and ``at_C`` are those of the first.
    """
    states = rates.size // WIDTH
    for k in range(first, last):
        own, j = k * WIDTH + d, k - first
        b, c, kept = at_B + j * step_B, at_C + j * step_C, j * states * LANES
        delta, u, y = load(all_delta, at_delta + own), load(u_c, own), load(y_c, own)
        for n in range(states):
            at = n * WIDTH + d
            decay = exp2(delta * load(rates, at))
            store(decays, kept + n * LANES, decay)
            value = decay * load(h, at) + u * entry(B, b + n)
            store(h, at, value)
            y += value * entry(C, c + n)
        store(y_c, own, y)


@_inner
def _from_boundary(later, rates, n, d, least):
    """Decays of state n from the boundary to a place ``later`` before it; exactly 0 for those that count as 0."""
    return larger(exp2(later * load(rates, n * WIDTH + d)) - least, later - later)


@_inner
def _look_back(later, rates, d, vanished, least, weights, at_weights, count, decays, impact_c):
    """``impact_c`` (count, LANES): decays to the boundary, weighted and added over the states, for ``count`` tokens.

    ``later``: sums of the steps after them. ``TOGETHER`` states in one go, and those that are left one by one.
    """
    states = rates.size // WIDTH
    for at in range(0, count * LANES, LANES):
        store(impact_c, at, later - later)
    whole = states // TOGETHER * TOGETHER
    for n in range(0, whole, TOGETHER):
        gone = True
        for m in range(n, n + TOGETHER):
            gone = gone and all_at_most(later * load(rates, m * WIDTH + d), vanished)
        if gone:
            continue
        p0, p1 = _from_boundary(later, rates, n, d, least), _from_boundary(later, rates, n + 1, d, least)
        p2, p3 = _from_boundary(later, rates, n + 2, d, least), _from_boundary(later, rates, n + 3, d, least)
        for k in range(count - 1, -1, -1):
            w, kept = at_weights + k * states + n, (k * states + n) * LANES
            total = load(impact_c, k * LANES) + p0 * entry(weights, w) + p1 * entry(weights, w + 1)
            store(impact_c, k * LANES, total + p2 * entry(weights, w + 2) + p3 * entry(weights, w + 3))
            p0, p1 = p0 * load(decays, kept), p1 * load(decays, kept + LANES)
            p2, p3 = p2 * load(decays, kept + 2 * LANES), p3 * load(decays, kept + 3 * LANES)
    for n in range(whole, states):
        p = _from_boundary(later, rates, n, d, least)
        for k in range(count - 1, -1, -1):
            total = load(impact_c, k * LANES) + p * entry(weights, at_weights + k * states + n)
            store(impact_c, k * LANES, total)
            p = p * load(decays, (k * states + n) * LANES)


@_inner
def _found(later, rates, d, vanished, least, weights, at_weights, u_c, k, weight, used, count, decays, impact_c, reduce,
    found_c,
):  # fmt: skip
    """Adds to ``found_c`` (CHUNK, LANES) what ``count`` tokens from ``k`` on do in the channels at ``d``."""
    _look_back(later, rates, d, vanished, least, weights, at_weights, count, decays, impact_c)
    for j in range(count):
        store(impact_c, j * LANES, load(impact_c, j * LANES) * load(u_c, (k + j) * WIDTH + d) * weight)
    if reduce == MAX:  # lanes that are no channels hold 0, which may not be the maximum
        for lane in range(used - d, LANES):
            impact_c[lane : count * LANES : LANES] = impact_c[0 : count * LANES : LANES]
    fold(impact_c, count, reduce, found_c, k * LANES)


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
    rates, h = load_rates(A, first, used, dtype), zeros(states, dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    weight_block = load_channels(channel_weights[i], first, used, dtype)
    x_c, z_c, u_c, y_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    impact_c, found_c = zeros(FEW, dtype, LANES), zeros(CHUNK, dtype, LANES)
    decays, delta, sums = zeros(FEW * states, dtype, LANES), unset(length, dtype), unset(-(-present // FEW), dtype)
    at_dt = i * strides[1, 0] + first
    _all_steps(dt, at_dt, strides[1, 1], length, used, bias_block, present, one, x_c, delta, sums)
    for d in range(used):
        for n in range(states):
            h[n * WIDTH + d] = initial[i, first + d, n]
    for t0 in range(0, length, CHUNK):
        steps = min(CHUNK, length - t0)
        if starts.shape[1] > 0:
            starts[i, t0 // CHUNK, block] = h
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, CHUNK, x_c)
        fetch(z, i * strides[4, 0] + t0 * strides[4, 1] + first, strides[4, 1], steps, used, CHUNK, z_c)
        _multiply(delta, t0 * WIDTH, x_c, D_block, steps, u_c, y_c)
        found_c[:] = -np.inf if reduce == MAX else 0
        for d in range(0, WIDTH, LANES):
            for k in range(0, steps, FEW):
                at, last = t0 + k, min(k + FEW, steps)
                at_B, at_C = i * strides[2, 0] + at * strides[2, 1], i * strides[3, 0] + at * strides[3, 1]
                _advance(
                    h, rates, d, delta, t0 * WIDTH, u_c, B, at_B, strides[2, 1], C, at_C, strides[3, 1], k, last, y_c,
                    decays,
                )  # fmt: skip
                count = min(last, present - t0) - k
                if count > 0 and d < used:
                    _found(
                        load(sums, at // FEW * WIDTH + d), rates, d, vanished, least, weights,
                        (i * present + at) * states, u_c, k, load(weight_block, d), used, count, decays, impact_c,
                        reduce, found_c,
                    )  # fmt: skip
        gate(z_c, one, steps, y_c)
        put(y_c, out, (i * length + t0) * channels + first, channels, steps, used)
        if t0 < present:
            reduce_lanes(found_c, min(steps, present - t0), reduce, best, to + t0)
    for d in range(used):
        for n in range(states):
            final[i, first + d, n] = h[n * WIDTH + d]


@kernel
def forward(
    x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, weights, channel_weights, present, reduce,
    vanished, best,
):  # fmt: skip
    """:func:`simba_lab.kernels.cpu.scan.forward`, and the scores of the first ``present`` tokens.

    ``best`` (B blocks present,), weights (B present N,), channel weights (B, D), ``reduce`` and ``vanished`` as in
    :func:`simba_lab.kernels.cpu.impact.scores`, with blocks of ``WIDTH`` channels.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(final.shape[0] * blocks):
        before = flush_denormals()
        _job(
            x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, weights, channel_weights, present,
            reduce, vanished, best, job // blocks, job % blocks, job * present,
        )  # fmt: skip
        restore_denormals(before)
