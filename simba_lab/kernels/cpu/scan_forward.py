"""Selective scan for CPUs, forward, compiled by Numba.

One job is one sequence times one block of ``WIDTH`` channels. Blocks are padded to ``WIDTH`` with channels in which x,
A, D and the gradients are 0. Softplus, skip connection and gate are fused: nothing of size (length, channels) is
written but the output.

Chunk by chunk of ``CHUNK`` tokens, what does not touch the state is done for all of them at once, in scratch memory
(CHUNK, WIDTH) that stays in the cache; then the state passes through the chunk, ``LANES`` channels and ``TOGETHER``
states at a time, so that these stay in registers. States are padded with some of which nothing is read. The state at
the start of every chunk is kept for the backward pass.
"""

from __future__ import annotations

import numba

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, move, put, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, sigmoid, softplus
from simba_lab.kernels.cpu.vectors import LANES, entry, load, store

CHUNK = 32
TOGETHER = 4

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def padded(states):
    """``states`` rounded up to a multiple of ``TOGETHER``."""
    return -(-states // TOGETHER) * TOGETHER


@_inner
def fetch_states(flat, at, stride, steps, states, rows):
    """B or C of ``steps`` tokens into ``rows`` (steps, padded states), in which what is padding stays 0."""
    for k in range(steps):
        move(flat, at + k * stride, states, rows, k * padded(states))


@_inner
def prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c):
    """Step sizes of a chunk, their products with x, and the skip connection in ``y_c``."""
    for d in range(0, WIDTH, LANES):
        bias, skip = load(bias_block, d), load(D_block, d)
        for at in range(d, steps * WIDTH, WIDTH):
            delta, x = softplus(load(dt_c, at) + bias, one), load(x_c, at)
            store(delta_c, at, delta)
            store(u_c, at, delta * x)
            store(y_c, at, skip * x)


@_inner
def advance(h, rates, d, n, delta, at_delta, u_c, B_c, C_c, steps, y_c, decays=None):
    """``TOGETHER`` states of the lanes at ``d`` move on through a chunk; what they add to the output goes to ``y_c``.

    ``h`` and ``rates`` (padded states, WIDTH), of which those from ``n`` on; ``B_c`` and ``C_c`` (steps, padded
    states). The chunk's steps begin at ``at_delta``. ``decays`` (steps, TOGETHER, LANES) are kept if asked for.
    """
    states, at, row = rates.size // WIDTH, n * WIDTH + d, WIDTH
    r0, r1, r2, r3 = load(rates, at), load(rates, at + row), load(rates, at + 2 * row), load(rates, at + 3 * row)
    h0, h1, h2, h3 = load(h, at), load(h, at + row), load(h, at + 2 * row), load(h, at + 3 * row)
    for k in range(steps):
        own, b, to = k * WIDTH + d, k * states + n, k * TOGETHER * LANES
        step, u, y = load(delta, at_delta + own), load(u_c, own), load(y_c, own)
        a0, a1, a2, a3 = exp2(step * r0), exp2(step * r1), exp2(step * r2), exp2(step * r3)
        if decays is not None:
            store(decays, to, a0)
            store(decays, to + LANES, a1)
            store(decays, to + 2 * LANES, a2)
            store(decays, to + 3 * LANES, a3)
        h0, h1 = a0 * h0 + u * entry(B_c, b), a1 * h1 + u * entry(B_c, b + 1)
        h2, h3 = a2 * h2 + u * entry(B_c, b + 2), a3 * h3 + u * entry(B_c, b + 3)
        y = y + h0 * entry(C_c, b) + h1 * entry(C_c, b + 1)
        store(y_c, own, y + h2 * entry(C_c, b + 2) + h3 * entry(C_c, b + 3))
    store(h, at, h0)
    store(h, at + row, h1)
    store(h, at + 2 * row, h2)
    store(h, at + 3 * row, h3)


@_inner
def gate(z_c, one, steps, y_c):
    for at in range(0, steps * WIDTH, LANES):
        z = load(z_c, at)
        store(y_c, at, load(y_c, at) * z * sigmoid(z, one))


@_inner
def load_state(initial, i, first, used, h):
    for d in range(used):
        for n in range(initial.shape[2]):
            h[n * WIDTH + d] = initial[i, first + d, n]


@_inner
def put_state(h, final, i, first, used):
    for d in range(used):
        for n in range(final.shape[2]):
            final[i, first + d, n] = h[n * WIDTH + d]


@_inner
def _job(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, i, block):
    (channels, states), dtype = A.shape, out.dtype
    length = out.size // (final.shape[0] * channels)
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    rates, h = load_rates(A, first, used, dtype, WIDTH, padded(states)), zeros(padded(states), dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    B_c, C_c = zeros(CHUNK, dtype, padded(states)), zeros(CHUNK, dtype, padded(states))
    x_c, dt_c, z_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    delta_c, u_c, y_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    load_state(initial, i, first, used, h)
    for t0 in range(0, length, CHUNK):
        steps = min(CHUNK, length - t0)
        if starts.shape[1] > 0:
            starts[i, t0 // CHUNK, block] = h[: states * WIDTH]
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, CHUNK, x_c)
        fetch(dt, i * strides[1, 0] + t0 * strides[1, 1] + first, strides[1, 1], steps, used, CHUNK, dt_c)
        fetch(z, i * strides[4, 0] + t0 * strides[4, 1] + first, strides[4, 1], steps, used, CHUNK, z_c)
        fetch_states(B, i * strides[2, 0] + t0 * strides[2, 1], strides[2, 1], steps, states, B_c)
        fetch_states(C, i * strides[3, 0] + t0 * strides[3, 1], strides[3, 1], steps, states, C_c)
        prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c)
        for d in range(0, WIDTH, LANES):
            for n in range(0, padded(states), TOGETHER):
                advance(h, rates, d, n, delta_c, 0, u_c, B_c, C_c, steps, y_c)
        gate(z_c, one, steps, y_c)
        put(y_c, out, (i * length + t0) * channels + first, channels, steps, used)
    put_state(h, final, i, first, used)


@kernel
def forward(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts):
    """Gated output and final state; ``starts`` (B, ceil(L / CHUNK), D / WIDTH, N WIDTH) unless its length is 0.

    ``strides[i]`` holds (batch, token) of x, dt, B, C, z in that order; out (B L D,), final and initial (B, D, N).
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(final.shape[0] * blocks):
        before = flush_denormals()
        _job(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, job // blocks, job % blocks)
        restore_denormals(before)
