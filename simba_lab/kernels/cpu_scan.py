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

from simba_lab.kernels.cpu_math import FAST, exp, sigmoid, softplus

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
def _load_token(x, dt, x_at, dt_at, used, bias_block, one, x_t, delta_t, u_t):
    """x, step size and their product for one token of a block; lanes beyond ``used`` keep a step of 0."""
    for d in range(used):
        x_t[d] = x[x_at + d]
        delta_t[d] = softplus(dt[dt_at + d] + bias_block[d], one)
        u_t[d] = delta_t[d] * x_t[d]


@_compile
def forward(x, dt, dt_bias, A, B, C, D, z, strides, initial, out, final, starts):
    """Gated output and final state; ``starts`` (B, ceil(L / CHUNK), D / WIDTH, N, WIDTH) unless its length is 0.

    ``strides[i]`` holds (batch, token) of x, dt, B, C, z in that order; out (B, L, D), final and initial (B, D, N).
    """
    batch, length, channels = out.shape
    states = A.shape[1]
    blocks = (channels + WIDTH - 1) // WIDTH
    keep = starts.shape[1] > 0
    one = out.dtype.type(1)
    for job in numba.prange(batch * blocks):
        i, block = job // blocks, job % blocks
        first = block * WIDTH
        used = min(WIDTH, channels - first)
        A_block = np.empty((states, WIDTH), out.dtype)
        h = np.zeros((states, WIDTH), out.dtype)
        D_block, bias_block, x_t, delta_t, u_t, y_t = np.zeros((6, WIDTH), out.dtype)
        _load_parameters(A, D, dt_bias, first, used, A_block, D_block, bias_block)
        for d in range(used):
            for n in range(states):
                h[n, d] = initial[i, first + d, n]
        for t in range(length):
            if keep and t % CHUNK == 0:
                starts[i, t // CHUNK, block] = h
            x_at = i * strides[0, 0] + t * strides[0, 1] + first
            dt_at = i * strides[1, 0] + t * strides[1, 1] + first
            _load_token(x, dt, x_at, dt_at, used, bias_block, one, x_t, delta_t, u_t)
            B_at = i * strides[2, 0] + t * strides[2, 1]
            C_at = i * strides[3, 0] + t * strides[3, 1]
            for d in range(WIDTH):
                y_t[d] = D_block[d] * x_t[d]
            for n in range(states):
                b, c = B[B_at + n], C[C_at + n]
                for d in range(WIDTH):
                    h[n, d] = exp(delta_t[d] * A_block[n, d]) * h[n, d] + u_t[d] * b
                    y_t[d] += h[n, d] * c
            z_at = i * strides[4, 0] + t * strides[4, 1] + first
            for d in range(used):
                gate = z[z_at + d]
                out[i, t, first + d] = y_t[d] * gate * sigmoid(gate, one)
        for d in range(used):
            for n in range(states):
                final[i, first + d, n] = h[n, d]


@_compile
def backward(
    x, dt, dt_bias, A, B, C, D, z, strides, starts, dout, dfinal,
    dx, ddt, dA, dB, dC, dD, dz, dinitial,
):  # fmt: skip
    """All gradients. dA (B, D, N) and dD (B, D) per sequence, dB and dC (B, blocks, L, N) per block; the caller adds.

    ddt is the gradient before bias and softplus; its sum over batch and tokens is the gradient of ``dt_bias``.
    """
    batch, length, channels = dout.shape
    states = A.shape[1]
    blocks = (channels + WIDTH - 1) // WIDTH
    one = dout.dtype.type(1)
    for job in numba.prange(batch * blocks):
        i, block = job // blocks, job % blocks
        first = block * WIDTH
        used = min(WIDTH, channels - first)
        A_block = np.empty((states, WIDTH), dout.dtype)
        dA_block, g, h = np.zeros((3, states, WIDTH), dout.dtype)
        decay, before = np.empty((2, CHUNK, states, WIDTH), dout.dtype)
        x_c, delta_c, u_c, y_c = np.zeros((4, CHUNK, WIDTH), dout.dtype)
        D_block, bias_block, dD_block, dy_t, du_t, ddelta_t = np.zeros((6, WIDTH), dout.dtype)
        _load_parameters(A, D, dt_bias, first, used, A_block, D_block, bias_block)
        for d in range(used):
            for n in range(states):
                g[n, d] = dfinal[i, first + d, n]
        for chunk in range((length + CHUNK - 1) // CHUNK - 1, -1, -1):
            t0 = chunk * CHUNK
            steps = min(CHUNK, length - t0)
            h[:] = starts[i, chunk, block]
            for k in range(steps):  # the chunk again, forward, keeping decays and states
                t = t0 + k
                x_at = i * strides[0, 0] + t * strides[0, 1] + first
                dt_at = i * strides[1, 0] + t * strides[1, 1] + first
                _load_token(x, dt, x_at, dt_at, used, bias_block, one, x_c[k], delta_c[k], u_c[k])
                B_at = i * strides[2, 0] + t * strides[2, 1]
                C_at = i * strides[3, 0] + t * strides[3, 1]
                for d in range(WIDTH):
                    y_c[k, d] = D_block[d] * x_c[k, d]
                for n in range(states):
                    b, c = B[B_at + n], C[C_at + n]
                    for d in range(WIDTH):
                        before[k, n, d] = h[n, d]
                        decay[k, n, d] = exp(delta_c[k, d] * A_block[n, d])
                        h[n, d] = decay[k, n, d] * h[n, d] + u_c[k, d] * b
                        y_c[k, d] += h[n, d] * c
            for k in range(steps - 1, -1, -1):
                t = t0 + k
                z_at = i * strides[4, 0] + t * strides[4, 1] + first
                for d in range(used):
                    gate = z[z_at + d]
                    opened = sigmoid(gate, one)
                    dout_t = dout[i, t, first + d]
                    dz[i, t, first + d] = dout_t * y_c[k, d] * opened * (one + gate * (one - opened))
                    dy_t[d] = dout_t * gate * opened
                for d in range(WIDTH):
                    du_t[d] = 0
                    ddelta_t[d] = 0
                B_at = i * strides[2, 0] + t * strides[2, 1]
                C_at = i * strides[3, 0] + t * strides[3, 1]
                for n in range(states):
                    b, c = B[B_at + n], C[C_at + n]
                    db, dc = one - one, one - one
                    for d in range(WIDTH):
                        kept = decay[k, n, d] * before[k, n, d]
                        dc += dy_t[d] * (kept + u_c[k, d] * b)
                        dh = g[n, d] + dy_t[d] * c
                        db += dh * u_c[k, d]
                        du_t[d] += dh * b
                        ddecay = dh * kept
                        ddelta_t[d] += ddecay * A_block[n, d]
                        dA_block[n, d] += ddecay * delta_c[k, d]
                        g[n, d] = dh * decay[k, n, d]
                    dB[i, block, t, n] = db
                    dC[i, block, t, n] = dc
                dt_at = i * strides[1, 0] + t * strides[1, 1] + first
                for d in range(used):
                    dx[i, t, first + d] = du_t[d] * delta_c[k, d] + dy_t[d] * D_block[d]
                    # not 1 - exp(-delta), of which a small delta leaves few digits
                    slope = sigmoid(dt[dt_at + d] + bias_block[d], one)
                    ddt[i, t, first + d] = (ddelta_t[d] + du_t[d] * x_c[k, d]) * slope
                    dD_block[d] += dy_t[d] * x_c[k, d]
        for d in range(used):
            dD[i, first + d] = dD_block[d]
            for n in range(states):
                dA[i, first + d, n] = dA_block[n, d]
                dinitial[i, first + d, n] = g[n, d]
