"""Selective scan for CPUs, backward, compiled by Numba; jobs, blocks and chunks as in the forward pass.

From the state at the start of a chunk, which the forward pass kept, the others are recomputed, ``LANES`` channels at a
time, so that they and the decays stay in the cache. Sums that cross jobs (A, B, C, D, bias) are written per job and
added in a fixed order: results do not depend on the number of threads.
"""

from __future__ import annotations

import numba

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, put, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, sigmoid
from simba_lab.kernels.cpu.scan_forward import CHUNK, load_state, prepare, put_state
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
def _replay(rates, start, d, delta_c, u_c, B, at_B, step_B, C, at_C, step_C, dy_c, steps, h, decay, y_c, dC_c):
    """The forward pass again, from the start of a chunk, for the lanes at ``d``.

    Keeps decays and the states before tokens.
    Adds to ``dC_c`` (steps, N, LANES) the gradient of C, to be added up over lanes.
    """
    states = rates.size // WIDTH
    for n in range(states):
        store(h, n * LANES, load(start, n * WIDTH + d))
    for k in range(steps):
        own, b, c = k * WIDTH + d, at_B + k * step_B, at_C + k * step_C
        delta, u, y, dy = load(delta_c, own), load(u_c, own), load(y_c, own), load(dy_c, own)
        for n in range(states):
            at = (k * states + n) * LANES
            factor = exp2(delta * load(rates, n * WIDTH + d))
            value = factor * load(h, at) + u * entry(B, b + n)
            store(decay, at, factor)
            store(h, at + states * LANES, value)
            store(dC_c, at, load(dC_c, at) + dy * value)
            y += value * entry(C, c + n)
        store(y_c, own, y)


@_inner
def _retreat(
    rates, d, delta_c, u_c, B, at_B, step_B, C, at_C, step_C, dy_c, steps, h, decay, g, du_c, dlog_c, dA_block, dB_c
):  # fmt: skip
    """Backwards through a chunk: ``g`` (N, WIDTH), the gradient of the state, and what it passes on.

    ``dlog_c`` is the gradient of the step size through the decays, times log2(e).
    """
    states = rates.size // WIDTH
    for k in range(steps - 1, -1, -1):
        own, b, c = k * WIDTH + d, at_B + k * step_B, at_C + k * step_C
        delta, u, dy = load(delta_c, own), load(u_c, own), load(dy_c, own)
        du = dlog = dy - dy
        for n in range(states):
            at, of_state = (k * states + n) * LANES, n * WIDTH + d
            dh = load(g, of_state) + dy * entry(C, c + n)
            store(dB_c, at, load(dB_c, at) + dh * u)
            du += dh * entry(B, b + n)
            dh = dh * load(decay, at)
            store(g, of_state, dh)
            dh = dh * load(h, at)
            dlog += dh * load(rates, of_state)
            store(dA_block, of_state, load(dA_block, of_state) + dh * delta)
        store(du_c, own, du)
        store(dlog_c, own, dlog)


@_inner
def _add_lanes(sums, count, target, first):
    """``target`` from ``first`` on: each of ``count`` vectors added up, and 0 in their place."""
    for at in range(count):
        lanes_ = load(sums, at * LANES)
        target[first + at] = total(lanes_)
        store(sums, at * LANES, lanes_ - lanes_)


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
    rates = load_rates(A, first, used, dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    g, dA_block, dD_block = zeros(states, dtype), zeros(states, dtype), zeros(1, dtype)
    h, decay = zeros((CHUNK + 1) * states, dtype, LANES), zeros(CHUNK * states, dtype, LANES)
    dB_c, dC_c = zeros(CHUNK * states, dtype, LANES), zeros(CHUNK * states, dtype, LANES)
    x_c, dt_c, z_c, dout_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    delta_c, u_c, y_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    dy_c, du_c, dlog_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    load_state(dfinal, i, first, used, g)
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        t0 = chunk * CHUNK
        steps = min(CHUNK, length - t0)
        start = starts[i, chunk, block]
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, -CHUNK, x_c)
        fetch(dt, i * strides[1, 0] + t0 * strides[1, 1] + first, strides[1, 1], steps, used, -CHUNK, dt_c)
        fetch(z, i * strides[4, 0] + t0 * strides[4, 1] + first, strides[4, 1], steps, used, -CHUNK, z_c)
        fetch(dout, i * strides[5, 0] + t0 * strides[5, 1] + first, strides[5, 1], steps, used, -CHUNK, dout_c)
        prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c)
        _open_gate(z_c, dout_c, steps, one, dy_c)
        at_B, at_C = i * strides[2, 0] + t0 * strides[2, 1], i * strides[3, 0] + t0 * strides[3, 1]
        for d in range(0, WIDTH, LANES):
            _replay(
                rates, start, d, delta_c, u_c, B, at_B, strides[2, 1], C, at_C, strides[3, 1], dy_c, steps,
                h, decay, y_c, dC_c,
            )  # fmt: skip
            _retreat(
                rates, d, delta_c, u_c, B, at_B, strides[2, 1], C, at_C, strides[3, 1], dy_c, steps,
                h, decay, g, du_c, dlog_c, dA_block, dB_c,
            )  # fmt: skip
        to = ((i * blocks + block) * length + t0) * states
        _add_lanes(dB_c, steps * states, dB, to)
        _add_lanes(dC_c, steps * states, dC, to)
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
