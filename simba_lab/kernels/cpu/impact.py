"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that neither (L, D, N) nor (L, D) is ever
stored. Once every decay of one state in a block of channels is 0 in fp32 it stays 0 for all earlier tokens, and that
state is left out: far from the boundary most of them are.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.elementary import FAST, exp, softplus

WIDTH = 64
MAX, ABSMAX, L2 = 0, 1, 2

_compile = numba.njit(parallel=True, cache=True, fastmath=FAST, error_model="numpy")
_inner = numba.njit(fastmath=FAST, error_model="numpy")


@numba.njit(fastmath=True, error_model="numpy")  # without regard for NaN a maximum is a vector instruction
def _largest(values):
    best = values[0]
    for d in range(values.size):
        best = values[d] if values[d] > best else best
    return best


@_inner
def _reduced(impact, reduce):
    """Maximum, maximum of |.| (taken in place) or sum of squares over the channels of a block; a NaN stays one."""
    total = impact[0] - impact[0]
    if reduce == L2:
        for d in range(impact.size):
            total += impact[d] * impact[d]
        return total
    for d in range(impact.size):
        total += impact[d]
    if total != total:
        return total
    if reduce == ABSMAX:
        for d in range(impact.size):
            impact[d] = abs(impact[d])
    return _largest(impact)


@_inner
def _impacts(alive, A_block, later, B_row, C_row, x_t, delta_t, total, impact):
    """Impact of one token, per channel of the block."""
    for d in range(WIDTH):
        total[d] = 0
    for n in range(alive.size):
        if alive[n]:
            weight = B_row[n] * C_row[n]
            A_n = A_block[n]
            for d in range(WIDTH):
                total[d] += exp(later[d] * A_n[d]) * weight
    for d in range(WIDTH):
        impact[d] = total[d] * delta_t[d] * x_t[d]
        later[d] += delta_t[d]


@_inner
def _mark_alive(alive, A_block, later, exponent, used, vanished):
    """A state whose decays are all 0 in this block stays so for every earlier token."""
    for n in range(alive.size):
        A_n = A_block[n]
        for d in range(used):
            exponent[d] = later[d] * A_n[d]
        alive[n] = _largest(exponent[:used]) > vanished


@_inner
def _score_job(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial, i, block):
    (channels, states), length, dtype = A.shape, partial.shape[2], partial.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    A_block = np.zeros((states, WIDTH), dtype)
    later, total, impact = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    x_t, delta_t, exponent = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    alive = np.ones(states, np.bool_)
    for d in range(used):
        for n in range(states):
            A_block[n, d] = A[first + d, n]
    gate_row, bias_row, C_row = gate[i, first : first + used], dt_bias[first : first + used], C_boundary[i]
    for t in range(length - 1, -1, -1):
        x_at = i * strides[0, 0] + t * strides[0, 1] + first
        dt_at = i * strides[1, 0] + t * strides[1, 1] + first
        B_at = i * strides[2, 0] + t * strides[2, 1]
        # Rows are indexed from 0, so that the compiler can tell that no index is negative.
        x_row, dt_row, B_row = x[x_at : x_at + used], dt[dt_at : dt_at + used], B[B_at : B_at + states]
        for d in range(used):
            x_t[d] = x_row[d] * gate_row[d]
            delta_t[d] = softplus(dt_row[d] + bias_row[d], one)
        _impacts(alive, A_block, later, B_row, C_row, x_t, delta_t, total, impact)
        partial[i, block, t] = _reduced(impact[:used], reduce)
        if t % 16 == 0:
            _mark_alive(alive, A_block, later, exponent, used, vanished)


@_compile
def scores(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial):
    """``partial`` (B, blocks, L): per block of channels the maximum, maximum of |.|, or sum of squares.

    ``strides[i]`` holds (batch, token) of x, dt, B; C_boundary (B, N); gate (B, D). ``vanished`` is the exponent below
    which exp is 0 in this dtype.
    """
    blocks = partial.shape[1]
    for job in numba.prange(partial.shape[0] * blocks):
        _score_job(
            x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial, job // blocks, job % blocks
        )  # fmt: skip
