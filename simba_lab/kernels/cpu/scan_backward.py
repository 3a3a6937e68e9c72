"""Selective scan for CPUs, backward, compiled by Numba; jobs, blocks and chunks as in the forward pass.

From the state at the start of a chunk, which the forward pass kept, the others are recomputed, ``LANES`` channels and
``TOGETHER`` states at a time, so that they and the decays stay in the cache. Sums that cross jobs (A, B, C, D, bias)
are written per job and added in a fixed order: results do not depend on the number of threads.
"""

from __future__ import annotations

import numba

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, move, put, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, sigmoid
from simba_lab.kernels.cpu.scan_forward import CHUNK, TOGETHER, fetch_states, load_state, padded, prepare, put_state
from simba_lab.kernels.cpu.vectors import LANES, entry, load, store, total

LN2 = 0.6931471805599453

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _open_gate(z_c, dout_c, steps, one, dy_c):
    """Gradient of the output before the gate."""
    for at in range(0, steps * WIDTH, LANES):
        z = load(z_c, at)
        store(dy_c, at, load(dout_c, at) * z * sigmoid(z, one))


@_inner
def _replay(rates, start, d, n, delta_c, u_c, B_c, C_c, dy_c, steps, h, decays, y_c, dC_c):
    """The forward pass again, from the start of a chunk, of ``TOGETHER`` states from ``n`` on in the lanes at ``d``.

    Keeps ``decays`` and the states ``h`` before tokens (steps, TOGETHER, LANES). Adds to ``dC_c`` (steps, padded
    states, LANES) the gradient of C, to be added up over lanes.
    """
    states, at, row = rates.size // WIDTH, n * WIDTH + d, WIDTH
    r0, r1, r2, r3 = load(rates, at), load(rates, at + row), load(rates, at + 2 * row), load(rates, at + 3 * row)
    h0, h1, h2, h3 = load(start, at), load(start, at + row), load(start, at + 2 * row), load(start, at + 3 * row)
    for k in range(steps):
        own, b, to = k * WIDTH + d, k * states + n, k * TOGETHER * LANES
        step, u, y, dy = load(delta_c, own), load(u_c, own), load(y_c, own), load(dy_c, own)
        a0, a1, a2, a3 = exp2(step * r0), exp2(step * r1), exp2(step * r2), exp2(step * r3)
        store(decays, to, a0)
        store(decays, to + LANES, a1)
        store(decays, to + 2 * LANES, a2)
        store(decays, to + 3 * LANES, a3)
        store(h, to, h0)
        store(h, to + LANES, h1)
        store(h, to + 2 * LANES, h2)
        store(h, to + 3 * LANES, h3)
        h0, h1 = a0 * h0 + u * entry(B_c, b), a1 * h1 + u * entry(B_c, b + 1)
        h2, h3 = a2 * h2 + u * entry(B_c, b + 2), a3 * h3 + u * entry(B_c, b + 3)
        y = y + h0 * entry(C_c, b) + h1 * entry(C_c, b + 1)
        store(y_c, own, y + h2 * entry(C_c, b + 2) + h3 * entry(C_c, b + 3))
        to = b * LANES
        store(dC_c, to, load(dC_c, to) + dy * h0)
        store(dC_c, to + LANES, load(dC_c, to + LANES) + dy * h1)
        store(dC_c, to + 2 * LANES, load(dC_c, to + 2 * LANES) + dy * h2)
        store(dC_c, to + 3 * LANES, load(dC_c, to + 3 * LANES) + dy * h3)


@_inner
def _retreat(
    rates, d, n, delta_c, u_c, B_c, C_c, dy_c, steps, h, decays, g, du_c, dlog_c, dA_block, dB_c
):  # fmt: skip
    """Backwards through a chunk: ``g`` (padded states, WIDTH), the gradient of the state, and what it passes on.

    Adds to ``du_c``, the gradient of u, and ``dlog_c``, that of the step size through the decays, times log2(e).
    """
    states, at, row = rates.size // WIDTH, n * WIDTH + d, WIDTH
    r0, r1, r2, r3 = load(rates, at), load(rates, at + row), load(rates, at + 2 * row), load(rates, at + 3 * row)
    g0, g1, g2, g3 = load(g, at), load(g, at + row), load(g, at + 2 * row), load(g, at + 3 * row)
    s0, s1 = load(dA_block, at), load(dA_block, at + row)
    s2, s3 = load(dA_block, at + 2 * row), load(dA_block, at + 3 * row)
    for k in range(steps - 1, -1, -1):
        own, b, of = k * WIDTH + d, k * states + n, k * TOGETHER * LANES
        step, u, dy = load(delta_c, own), load(u_c, own), load(dy_c, own)
        g0, g1 = g0 + dy * entry(C_c, b), g1 + dy * entry(C_c, b + 1)
        g2, g3 = g2 + dy * entry(C_c, b + 2), g3 + dy * entry(C_c, b + 3)
        to = b * LANES
        store(dB_c, to, load(dB_c, to) + g0 * u)
        store(dB_c, to + LANES, load(dB_c, to + LANES) + g1 * u)
        store(dB_c, to + 2 * LANES, load(dB_c, to + 2 * LANES) + g2 * u)
        store(dB_c, to + 3 * LANES, load(dB_c, to + 3 * LANES) + g3 * u)
        du = load(du_c, own) + g0 * entry(B_c, b) + g1 * entry(B_c, b + 1)
        store(du_c, own, du + g2 * entry(B_c, b + 2) + g3 * entry(B_c, b + 3))
        g0, g1 = g0 * load(decays, of), g1 * load(decays, of + LANES)
        g2, g3 = g2 * load(decays, of + 2 * LANES), g3 * load(decays, of + 3 * LANES)
        t0, t1 = g0 * load(h, of), g1 * load(h, of + LANES)
        t2, t3 = g2 * load(h, of + 2 * LANES), g3 * load(h, of + 3 * LANES)
        store(dlog_c, own, load(dlog_c, own) + t0 * r0 + t1 * r1 + t2 * r2 + t3 * r3)
        s0, s1, s2, s3 = s0 + t0 * step, s1 + t1 * step, s2 + t2 * step, s3 + t3 * step
    store(g, at, g0)
    store(g, at + row, g1)
    store(g, at + 2 * row, g2)
    store(g, at + 3 * row, g3)
    store(dA_block, at, s0)
    store(dA_block, at + row, s1)
    store(dA_block, at + 2 * row, s2)
    store(dA_block, at + 3 * row, s3)


@_inner
def _add_lanes(sums, steps, states, target, first):
    """``target`` (steps, N) from ``first`` on: vectors (steps, padded states) added up, and 0 in their place."""
    for k in range(steps):
        for n in range(states):
            at = (k * padded(states) + n) * LANES
            lanes_ = load(sums, at)
            target[first + k * states + n] = total(lanes_)
            store(sums, at, lanes_ - lanes_)


@_inner
def _input_gradients(
    dt_c, bias_block, x_c, z_c, dout_c, D_block, delta_c, dy_c, steps, one, ln2, y_c, du_c, dlog_c, dD_block
):  # fmt: skip
    """In place of ``y_c``, ``du_c`` and ``dlog_c`` the gradients of z, x and dt (before softplus)."""
    for d in range(0, WIDTH, LANES):
        bias, skip, dskip = load(bias_block, d), load(D_block, d), load(dD_block, d)
        for at in range(d, steps * WIDTH, WIDTH):
            x, z, dy, du = load(x_c, at), load(z_c, at), load(dy_c, at), load(du_c, at)
            opened = sigmoid(z, one)
            store(y_c, at, load(y_c, at) * load(dout_c, at) * opened * (one + z * (one - opened)))
            # not 1 - exp(-delta), of which a small delta leaves few digits
            slope = sigmoid(load(dt_c, at) + bias, one)
            store(dlog_c, at, (load(dlog_c, at) * ln2 + du * x) * slope)
            store(du_c, at, du * load(delta_c, at) + dy * skip)
            dskip += dy * x
        store(dD_block, d, dskip)


@_inner
def _job(
    x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial, i, block
):  # fmt: skip
    (channels, states), dtype = A.shape, dx.dtype
    length, blocks = dx.size // (dA.shape[0] * channels), starts.shape[2]
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one, ln2 = dtype.type(1), dtype.type(LN2)
    rates = load_rates(A, first, used, dtype, WIDTH, padded(states))
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    g, dA_block, start = zeros(padded(states), dtype), zeros(padded(states), dtype), zeros(padded(states), dtype)
    dD_block, B_c, C_c = zeros(1, dtype), zeros(CHUNK, dtype, padded(states)), zeros(CHUNK, dtype, padded(states))
    h, decays = zeros(CHUNK * TOGETHER, dtype, LANES), zeros(CHUNK * TOGETHER, dtype, LANES)
    dB_c, dC_c = zeros(CHUNK * padded(states), dtype, LANES), zeros(CHUNK * padded(states), dtype, LANES)
    x_c, dt_c, z_c, dout_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    delta_c, u_c, y_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    dy_c, du_c, dlog_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    load_state(dfinal, i, first, used, g)
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        t0 = chunk * CHUNK
        steps = min(CHUNK, length - t0)
        move(starts[i, chunk, block], 0, states * WIDTH, start, 0)
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, -CHUNK, x_c)
        fetch(dt, i * strides[1, 0] + t0 * strides[1, 1] + first, strides[1, 1], steps, used, -CHUNK, dt_c)
        fetch(z, i * strides[4, 0] + t0 * strides[4, 1] + first, strides[4, 1], steps, used, -CHUNK, z_c)
        fetch(dout, i * strides[5, 0] + t0 * strides[5, 1] + first, strides[5, 1], steps, used, -CHUNK, dout_c)
        prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c)
        _open_gate(z_c, dout_c, steps, one, dy_c)
        fetch_states(B, i * strides[2, 0] + t0 * strides[2, 1], strides[2, 1], steps, states, B_c)
        fetch_states(C, i * strides[3, 0] + t0 * strides[3, 1], strides[3, 1], steps, states, C_c)
        du_c[:] = 0
        dlog_c[:] = 0
        for d in range(0, WIDTH, LANES):
            for n in range(0, padded(states), TOGETHER):
                _replay(rates, start, d, n, delta_c, u_c, B_c, C_c, dy_c, steps, h, decays, y_c, dC_c)
                _retreat(
                    rates, d, n, delta_c, u_c, B_c, C_c, dy_c, steps, h, decays, g, du_c, dlog_c, dA_block, dB_c
                )  # fmt: skip
        to = ((i * blocks + block) * length + t0) * states
        _add_lanes(dB_c, steps, states, dB, to)
        _add_lanes(dC_c, steps, states, dC, to)
        _input_gradients(
            dt_c, bias_block, x_c, z_c, dout_c, D_block, delta_c, dy_c, steps, one, ln2, y_c, du_c, dlog_c, dD_block
        )  # fmt: skip
        to = (i * length + t0) * channels + first
        put(du_c, dx, to, channels, steps, used)
        put(dlog_c, ddt, to, channels, steps, used)
        put(y_c, dz, to, channels, steps, used)
    dD[i, first : first + used] = dD_block[:used]
    put_state(dA_block, dA, i, first, used)
    put_state(g, dinitial, i, first, used)


@kernel
def backward(
    x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial
):  # fmt: skip
    """All gradients. dA (B, D, N) and dD (B, D) per sequence, dB and dC (B, blocks, L, N) per block; the caller adds.

    ``strides[i]`` holds (batch, token) of x, dt, B, C, z, dout in that order; dx, ddt, dz, dB and dC are flat. ddt is
    the gradient before bias and softplus; its sum over batch and tokens is the gradient of ``dt_bias``.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(dA.shape[0] * blocks):
        before = flush_denormals()
        _job(
            x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial,
            job // blocks, job % blocks,
        )  # fmt: skip
        restore_denormals(before)
