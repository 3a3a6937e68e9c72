"""Selective scan for CPUs: forward and backward, compiled by Numba.

One job is one sequence times one block of ``WIDTH`` channels; its state stays in the first-level cache and every inner
loop runs over the block's channels, which LLVM turns into vector instructions. Blocks are padded to ``WIDTH`` with
channels whose step is 0, so the trip count is a constant. Softplus, skip connection and gate are fused: nothing of
size (length, channels) is written but the output.

The forward pass keeps the state at the start of every ``CHUNK`` tokens; the backward pass recomputes one chunk at a
time from it. Sums that cross jobs (A, B, C, D, bias) are written per job and added in a fixed order: results do not
depend on the number of threads.

Inputs come as flat views with the strides of batch and token, so slices of a projection need no copy.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.elementary import FAST, exp, sigmoid, softplus

WIDTH = 64
CHUNK = 32

_compile = numba.njit(parallel=True, cache=True, fastmath=FAST, error_model="numpy")
_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _load_parameters(A, D, dt_bias, first, used, A_block, D_block, bias_block):
    A_block[:] = 0
    D_block[:] = 0
    bias_block[:] = 0
    for d in range(used):
        D_block[d] = D[first + d]
        bias_block[d] = dt_bias[first + d]
        for n in range(A.shape[1]):
            A_block[n, d] = A[first + d, n]


@_inner
def _load_token(x_row, dt_row, bias_block, one, x_t, delta_t, u_t):
    """x, step size and their product for one token of a block; lanes beyond the row keep a step of 0."""
    for d in range(x_row.size):
        x_t[d] = x_row[d]
        delta_t[d] = softplus(dt_row[d] + bias_block[d], one)
        u_t[d] = delta_t[d] * x_row[d]


@_inner
def _row(flat, strides, i, t, first, used):
    """``used`` channels from ``first`` on of token t of sequence i.

    Loops index rows from 0, which the compiler knows to be in range; an index it cannot tell from a negative one,
    which Python counts from the end, would keep it from using vector instructions.
    """
    at = i * strides[0] + t * strides[1] + first
    return flat[at : at + used]


@_inner
def _advance(h, A_block, delta_t, u_t, B_t, C_t, y_t):
    """One token: the state moves on, and what it adds to the output is added to ``y_t``."""
    for n in range(h.shape[0]):
        b, c = B_t[n], C_t[n]
        h_n, A_n = h[n], A_block[n]
        for d in range(WIDTH):
            value = exp(delta_t[d] * A_n[d]) * h_n[d] + u_t[d] * b
            h_n[d] = value
            y_t[d] += value * c


@_inner
def _forward_job(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts, i, block):
    channels, states = A.shape
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = out.dtype.type(1)
    A_block = np.empty((states, WIDTH), out.dtype)
    h = np.zeros((states, WIDTH), out.dtype)
    D_block = np.zeros(WIDTH, out.dtype)
    bias_block = np.zeros(WIDTH, out.dtype)
    x_t = np.zeros(WIDTH, out.dtype)
    delta_t = np.zeros(WIDTH, out.dtype)
    u_t = np.zeros(WIDTH, out.dtype)
    y_t = np.zeros(WIDTH, out.dtype)
    _load_parameters(A, D, dt_bias, first, used, A_block, D_block, bias_block)
    for d in range(used):
        for n in range(states):
            h[n, d] = initial[i, first + d, n]
    for t in range(out.shape[1]):
        if starts.shape[1] > 0 and t % CHUNK == 0:
            starts[i, t // CHUNK, block] = h
        x_row = _row(x, strides[0], i, t, first, used)
        dt_row = _row(dt, strides[1], i, t, first, used)
        _load_token(x_row, dt_row, bias_block, one, x_t, delta_t, u_t)
        for d in range(WIDTH):
            y_t[d] = D_block[d] * x_t[d]
        B_t, C_t = _row(B, strides[2], i, t, 0, states), _row(C, strides[3], i, t, 0, states)
        _advance(h, A_block, delta_t, u_t, B_t, C_t, y_t)
        z_row = _row(z, strides[4], i, t, first, used)
        out_row = out[i, t, first : first + used]
        for d in range(used):
            out_row[d] = y_t[d] * z_row[d] * sigmoid(z_row[d], one)
    for d in range(used):
        for n in range(states):
            final[i, first + d, n] = h[n, d]


@_compile
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
def _replay(decay, before, h, A_block, delta_t, u_t, B_t, C_t, y_t):
    """:func:`_advance` that keeps the decays (N, WIDTH) and the state before the token (N, WIDTH)."""
    for n in range(h.shape[0]):
        b, c = B_t[n], C_t[n]
        h_n, A_n, decay_n, before_n = h[n], A_block[n], decay[n], before[n]
        for d in range(WIDTH):
            before_n[d] = h_n[d]
            decay_n[d] = exp(delta_t[d] * A_n[d])
            h_n[d] = decay_n[d] * h_n[d] + u_t[d] * b
            y_t[d] += h_n[d] * c


@_inner
def _retreat(g, dA_block, decay, before, A_block, delta_t, u_t, B_t, C_t, dy_t, du_t, ddelta_t, dB_t, dC_t):
    """One token backwards: ``g`` (N, WIDTH), the gradient of the state, moves to the token before."""
    for n in range(g.shape[0]):
        b, c = B_t[n], C_t[n]
        g_n, A_n, dA_n, decay_n, before_n = g[n], A_block[n], dA_block[n], decay[n], before[n]
        db, dc = b - b, c - c
        for d in range(WIDTH):
            kept = decay_n[d] * before_n[d]
            dh = g_n[d] + dy_t[d] * c
            dc += dy_t[d] * (kept + u_t[d] * b)
            db += dh * u_t[d]
            ddecay = dh * kept
            du_t[d] += dh * b
            ddelta_t[d] += ddecay * A_n[d]
            dA_n[d] += ddecay * delta_t[d]
            g_n[d] = dh * decay_n[d]
        dB_t[n] = db
        dC_t[n] = dc


@_inner
def _gate_backward(z_row, dout_row, y_t, one, dz_row, dy_t):
    """Gradients of the gate and of the output before it, for one token."""
    for d in range(z_row.size):
        opened = sigmoid(z_row[d], one)
        dz_row[d] = dout_row[d] * y_t[d] * opened * (one + z_row[d] * (one - opened))
        dy_t[d] = dout_row[d] * z_row[d] * opened


@_inner
def _input_backward(dt_row, bias_block, D_block, x_t, delta_t, dy_t, du_t, ddelta_t, one, dx_row, ddt_row, dD_block):
    """Gradients of x, of the step before softplus, and of D, for one token."""
    for d in range(dt_row.size):
        dx_row[d] = du_t[d] * delta_t[d] + dy_t[d] * D_block[d]
        # not 1 - exp(-delta), of which a small delta leaves few digits
        slope = sigmoid(dt_row[d] + bias_block[d], one)
        ddt_row[d] = (ddelta_t[d] + du_t[d] * x_t[d]) * slope
        dD_block[d] += dy_t[d] * x_t[d]


@_inner
def _backward_job(
    x, dt, dt_bias, A, B, C, D, z, strides, starts, dout, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial, i, block
):  # fmt: skip
    length, (channels, states), dtype = dout.shape[1], A.shape, dout.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    last = first + used
    one = dtype.type(1)
    A_block, dA_block = np.empty((states, WIDTH), dtype), np.zeros((states, WIDTH), dtype)
    g, h = np.zeros((states, WIDTH), dtype), np.zeros((states, WIDTH), dtype)
    decay, before = np.empty((CHUNK, states, WIDTH), dtype), np.empty((CHUNK, states, WIDTH), dtype)
    x_c, delta_c = np.zeros((CHUNK, WIDTH), dtype), np.zeros((CHUNK, WIDTH), dtype)
    u_c, y_c = np.zeros((CHUNK, WIDTH), dtype), np.zeros((CHUNK, WIDTH), dtype)
    D_block, bias_block, dD_block = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    dy_t, du_t, ddelta_t = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    _load_parameters(A, D, dt_bias, first, used, A_block, D_block, bias_block)
    for d in range(used):
        for n in range(states):
            g[n, d] = dfinal[i, first + d, n]
    for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
        t0 = chunk * CHUNK
        steps = min(CHUNK, length - t0)
        h[:] = starts[i, chunk, block]
        for k in range(steps):
            t = t0 + k
            x_row = _row(x, strides[0], i, t, first, used)
            dt_row = _row(dt, strides[1], i, t, first, used)
            _load_token(x_row, dt_row, bias_block, one, x_c[k], delta_c[k], u_c[k])
            y_t, x_t = y_c[k], x_c[k]
            for d in range(WIDTH):
                y_t[d] = D_block[d] * x_t[d]
            B_t, C_t = _row(B, strides[2], i, t, 0, states), _row(C, strides[3], i, t, 0, states)
            _replay(decay[k], before[k], h, A_block, delta_c[k], u_c[k], B_t, C_t, y_t)
        for k in range(steps - 1, -1, -1):
            t = t0 + k
            z_row = _row(z, strides[4], i, t, first, used)
            _gate_backward(z_row, dout[i, t, first:last], y_c[k], one, dz[i, t, first:last], dy_t)
            du_t[:] = 0
            ddelta_t[:] = 0
            B_t, C_t = _row(B, strides[2], i, t, 0, states), _row(C, strides[3], i, t, 0, states)
            _retreat(
                g, dA_block, decay[k], before[k], A_block, delta_c[k], u_c[k], B_t, C_t, dy_t, du_t, ddelta_t,
                dB[i, block, t], dC[i, block, t],
            )  # fmt: skip
            dt_row = _row(dt, strides[1], i, t, first, used)
            _input_backward(
                dt_row, bias_block, D_block, x_c[k], delta_c[k], dy_t, du_t, ddelta_t, one,
                dx[i, t, first:last], ddt[i, t, first:last], dD_block,
            )  # fmt: skip
    for d in range(used):
        dD[i, first + d] = dD_block[d]
        for n in range(states):
            dA[i, first + d, n] = dA_block[n, d]
            dinitial[i, first + d, n] = g[n, d]


@_compile
def backward(
    x, dt, dt_bias, A, B, C, D, z, strides, starts, dout, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial
):  # fmt: skip
    """All gradients. dA (B, D, N) and dD (B, D) per sequence, dB and dC (B, blocks, L, N) per block; the caller adds.

    ddt is the gradient before bias and softplus; its sum over batch and tokens is the gradient of ``dt_bias``.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(dout.shape[0] * blocks):
        _backward_job(
            x, dt, dt_bias, A, B, C, D, z, strides, starts, dout, dfinal, dx, ddt, dA, dB, dC, dD, dz, dinitial,
            job // blocks, job % blocks,
        )  # fmt: skip
