"""Selective scan for CPUs: forward and backward, compiled by Numba.

One job is one sequence times one block of ``WIDTH`` channels; its state stays in the first-level cache and every inner
loop runs over the block's channels, which LLVM turns into vector instructions. Blocks are padded to ``WIDTH`` with
channels in which x, A, D and the gradients are 0, so the trip count is a constant. Softplus, skip connection and gate
are fused: nothing of size (length, channels) is written but the output.

The forward pass goes token by token and keeps the state at the start of every ``CHUNK`` tokens; the backward pass
recomputes one chunk at a time from it. What does not touch the state is then faster done for a whole chunk.

Loops touch few arrays each, for the reason that :mod:`simba_lab.kernels.cpu.blocks` gives.

Sums that cross jobs (A, B, C, D, bias) are written per job and added in a fixed order: results do not depend on the
number of threads.
"""

from __future__ import annotations

import numba

from simba_lab.kernels.cpu.blocks import WIDTH, copy, load_channels, load_rates, row, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import FAST, exp2, sigmoid, softplus

CHUNK = 32
LN2 = 0.6931471805599453

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _step_and_input(dt_t, bias_block, x_t, one, delta_t, u_t):
    """Step size of one token and its product with x."""
    for d in range(WIDTH):
        delta = softplus(dt_t[d] + bias_block[d], one)
        delta_t[d] = delta
        u_t[d] = delta * x_t[d]


@_inner
def _skip(x_t, D_block, y_t):
    for d in range(WIDTH):
        y_t[d] = D_block[d] * x_t[d]


@_inner
def _advance(h, rates, delta_t, u_t, B_t, C_t, y_t):
    """One token: the state moves on, and what it adds to the output is added to ``y_t``."""
    for n in range(h.shape[0]):
        b, c = B_t[n], C_t[n]
        h_n, rates_n = h[n], rates[n]
        for d in range(WIDTH):
            value = exp2(delta_t[d] * rates_n[d]) * h_n[d] + u_t[d] * b
            h_n[d] = value
            y_t[d] += value * c


@_inner
def _gate(z_t, one, y_t):
    for d in range(WIDTH):
        y_t[d] *= z_t[d] * sigmoid(z_t[d], one)


@_inner
def _forward_job(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, i, block):
    length, (channels, states), dtype = out.shape[1], A.shape, out.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    rates = load_rates(A, first, used, dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    h = zeros(states, dtype)
    rows = zeros(6, dtype)
    x_t, dt_t, z_t, delta_t, u_t, y_t = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    for d in range(used):
        for n in range(states):
            h[n, d] = initial[i, first + d, n]
    for t in range(length):
        if starts.shape[1] > 0 and t % CHUNK == 0:
            starts[i, t // CHUNK, block] = h
        copy(row(x, strides[0], i, t, first, used), x_t)
        copy(row(dt, strides[1], i, t, first, used), dt_t)
        copy(row(z, strides[4], i, t, first, used), z_t)
        _step_and_input(dt_t, bias_block, x_t, one, delta_t, u_t)
        _skip(x_t, D_block, y_t)
        B_t, C_t = row(B, strides[2], i, t, 0, states), row(C, strides[3], i, t, 0, states)
        _advance(h, rates, delta_t, u_t, B_t, C_t, y_t)
        _gate(z_t, one, y_t)
        copy(y_t[:used], out[i, t, first : first + used])
    for d in range(used):
        for n in range(states):
            final[i, first + d, n] = h[n, d]


@kernel
def forward(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts):
    """Gated output and final state; ``starts`` (B, ceil(L / CHUNK), D / WIDTH, N, WIDTH) unless its length is 0.

    ``strides[i]`` holds (batch, token) of x, dt, B, C, z in that order; out (B, L, D), final and initial (B, D, N).
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(out.shape[0] * blocks):
        _forward_job(
            x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, job // blocks, job % blocks
        )  # fmt: skip


@_inner
def _load_tokens(flat, strides, i, t0, steps, first, used, rows):
    """Channels of a block, ``steps`` tokens from t0 on, into the first lanes of ``rows`` (CHUNK, WIDTH)."""
    for k in range(steps):
        copy(row(flat, strides, i, t0 + k, first, used), rows[k])


@_inner
def _store_tokens(rows, out, i, t0, steps, first, used):
    for k in range(steps):
        copy(rows[k, :used], out[i, t0 + k, first : first + used])


@_inner
def _prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c):
    """What the state needs of the tokens of a chunk, and the skip connection in ``y_c``."""
    for k in range(steps):
        _step_and_input(dt_c[k], bias_block, x_c[k], one, delta_c[k], u_c[k])
    for k in range(steps):
        _skip(x_c[k], D_block, y_c[k])


@_inner
def _decays(rates, delta_t, decay):
    """exp(delta A) of one token, (N, WIDTH)."""
    for n in range(rates.shape[0]):
        rates_n, decay_n = rates[n], decay[n]
        for d in range(WIDTH):
            decay_n[d] = exp2(delta_t[d] * rates_n[d])


@_inner
def _replay(decay, before, after, u_t, B_t, C_t, y_t):
    """:func:`_advance` that keeps every state: ``after`` (N, WIDTH) is the one that follows ``before``."""
    for n in range(decay.shape[0]):
        b, c = B_t[n], C_t[n]
        decay_n, before_n, after_n = decay[n], before[n], after[n]
        for d in range(WIDTH):
            value = decay_n[d] * before_n[d] + u_t[d] * b
            after_n[d] = value
            y_t[d] += value * c


@_inner
def _retreat(g, decay, u_t, B_t, C_t, dy_t, du_t, dB_t):
    """One token backwards: ``g`` (N, WIDTH), the gradient of the state, moves to the token before."""
    for n in range(g.shape[0]):
        b, c = B_t[n], C_t[n]
        g_n, decay_n = g[n], decay[n]
        db = b - b
        for d in range(WIDTH):
            dh = g_n[d] + dy_t[d] * c
            db += dh * u_t[d]
            du_t[d] += dh * b
            g_n[d] = dh * decay_n[d]
        dB_t[n] = db


@_inner
def _decay_gradients(g, before, after, rates, dy_t, zero, dlog_t, dC_t):
    """What the decays pass on to the step size, times log2(e), given ``g`` before the token; and the gradient of C."""
    for n in range(g.shape[0]):
        g_n, before_n, after_n, rates_n = g[n], before[n], after[n], rates[n]
        dc = zero
        for d in range(WIDTH):
            dlog_t[d] += g_n[d] * before_n[d] * rates_n[d]
            dc += dy_t[d] * after_n[d]
        dC_t[n] = dc


@_inner
def _rate_gradients(g, before, delta_t, dA_block):
    for n in range(g.shape[0]):
        g_n, before_n, dA_n = g[n], before[n], dA_block[n]
        for d in range(WIDTH):
            dA_n[d] += g_n[d] * before_n[d] * delta_t[d]


@_inner
def _gate_backward(z_c, dout_c, y_c, steps, one, dy_c):
    """Gradient of the output before the gate, and in place of ``y_c`` that of the gate."""
    for k in range(steps):
        z_t, dout_t, y_t, dy_t = z_c[k], dout_c[k], y_c[k], dy_c[k]
        for d in range(WIDTH):
            opened = sigmoid(z_t[d], one)
            y_t[d] *= dout_t[d] * opened * (one + z_t[d] * (one - opened))
            dy_t[d] = dout_t[d] * z_t[d] * opened


@_inner
def _step_gradients(dt_c, bias_block, x_c, du_c, steps, one, ln2, dlog_c):
    """In place of ``dlog_c`` the gradient of the step before softplus."""
    for k in range(steps):
        dt_t, x_t, du_t, dlog_t = dt_c[k], x_c[k], du_c[k], dlog_c[k]
        for d in range(WIDTH):
            # not 1 - exp(-delta), of which a small delta leaves few digits
            slope = sigmoid(dt_t[d] + bias_block[d], one)
            dlog_t[d] = (dlog_t[d] * ln2 + du_t[d] * x_t[d]) * slope


@_inner
def _input_gradients(D_block, delta_c, dy_c, steps, du_c):
    """In place of ``du_c`` the gradient of x."""
    for k in range(steps):
        delta_t, dy_t, du_t = delta_c[k], dy_c[k], du_c[k]
        for d in range(WIDTH):
            du_t[d] = du_t[d] * delta_t[d] + dy_t[d] * D_block[d]


@_inner
def _skip_gradients(x_c, dy_c, steps, dD_block):
    for k in range(steps):
        x_t, dy_t = x_c[k], dy_c[k]
        for d in range(WIDTH):
            dD_block[d] += dy_t[d] * x_t[d]


@_inner
def _backward_job(
    x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial, i, block
):  # fmt: skip
    length, (channels, states), dtype = dx.shape[1], A.shape, dx.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    zero, one, ln2 = dtype.type(0), dtype.type(1), dtype.type(LN2)
    rates = load_rates(A, first, used, dtype)
    D_block, bias_block = load_channels(D, first, used, dtype), load_channels(dt_bias, first, used, dtype)
    dA_block, dD_block = zeros(states, dtype), zeros(1, dtype)[0]
    g = zeros(states, dtype)
    decay = zeros(CHUNK * states, dtype).reshape(CHUNK, states, WIDTH)
    h = zeros((CHUNK + 1) * states, dtype).reshape(CHUNK + 1, states, WIDTH)
    x_c, dt_c, z_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    delta_c, u_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    y_c, dout_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    dy_c, du_c, dlog_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    for d in range(used):
        for n in range(states):
            g[n, d] = dfinal[i, first + d, n]
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        t0 = chunk * CHUNK
        steps = min(CHUNK, length - t0)
        h[0] = starts[i, chunk, block]
        _load_tokens(x, strides[0], i, t0, steps, first, used, x_c)
        _load_tokens(dt, strides[1], i, t0, steps, first, used, dt_c)
        _load_tokens(z, strides[4], i, t0, steps, first, used, z_c)
        _load_tokens(dout, strides[5], i, t0, steps, first, used, dout_c)
        _prepare(dt_c, bias_block, x_c, D_block, steps, one, delta_c, u_c, y_c)
        for k in range(steps):
            B_t, C_t = row(B, strides[2], i, t0 + k, 0, states), row(C, strides[3], i, t0 + k, 0, states)
            _decays(rates, delta_c[k], decay[k])
            _replay(decay[k], h[k], h[k + 1], u_c[k], B_t, C_t, y_c[k])
        _gate_backward(z_c, dout_c, y_c, steps, one, dy_c)
        du_c[:] = 0
        dlog_c[:] = 0
        for k in range(steps - 1, -1, -1):
            B_t, C_t = row(B, strides[2], i, t0 + k, 0, states), row(C, strides[3], i, t0 + k, 0, states)
            _retreat(g, decay[k], u_c[k], B_t, C_t, dy_c[k], du_c[k], dB[i, block, t0 + k])
            _decay_gradients(g, h[k], h[k + 1], rates, dy_c[k], zero, dlog_c[k], dC[i, block, t0 + k])
            _rate_gradients(g, h[k], delta_c[k], dA_block)
        _step_gradients(dt_c, bias_block, x_c, du_c, steps, one, ln2, dlog_c)
        _input_gradients(D_block, delta_c, dy_c, steps, du_c)
        _skip_gradients(x_c, dy_c, steps, dD_block)
        _store_tokens(du_c, dx, i, t0, steps, first, used)
        _store_tokens(dlog_c, ddt, i, t0, steps, first, used)
        _store_tokens(y_c, dz, i, t0, steps, first, used)
    for d in range(used):
        dD[i, first + d] = dD_block[d]
        for n in range(states):
            dA[i, first + d, n] = dA_block[n, d]
            dinitial[i, first + d, n] = g[n, d]


@kernel
def backward(
    x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial
):  # fmt: skip
    """All gradients. dA (B, D, N) and dD (B, D) per sequence, dB and dC (B, blocks, L, N) per block; the caller adds.

    ``strides[i]`` holds (batch, token) of x, dt, B, C, z, dout in that order. ddt is the gradient before bias and
    softplus; its sum over batch and tokens is the gradient of ``dt_bias``.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(dx.shape[0] * blocks):
        _backward_job(
            x, dt, dt_bias, A, B, C, D, z, dout, strides, starts, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial,
            job // blocks, job % blocks,
        )  # fmt: skip
