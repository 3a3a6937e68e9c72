"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that neither (L, D, N) nor (L, D) is ever
stored. Once every decay of one state in a block of channels is 0 in fp32 it stays 0 for all earlier tokens, and that
state is left out: far from the boundary most of them are.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.elementary import FAST, exp2, softplus

WIDTH = 64
MAX, ABSMAX, L2 = 0, 1, 2
LOG2E = 1.4426950408889634

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
def _weigh(alive, count, B_row, C_row, weights):
    for m in range(count):
        weights[m] = B_row[alive[m]] * C_row[alive[m]]


@_inner
def _sum_states(rates, weights, count, later, total):
    """``total`` (WIDTH,): the decays of one token, weighted and added over the states."""
    for m in range(count):
        weight, rates_m = weights[m], rates[m]
        for d in range(WIDTH):
            total[d] += exp2(later[d] * rates_m[d]) * weight


@_inner
def _impacts(total, delta_t, x_t, later, impact):
    """Impact of one token, per channel of the block; ``later`` moves on."""
    for d in range(WIDTH):
        impact[d] = total[d] * delta_t[d] * x_t[d]
    for d in range(WIDTH):
        later[d] += delta_t[d]


@_inner
def _load_token(x_row, gate_row, dt_row, bias_row, one, x_t, delta_t):
    """Two loops: LLVM makes vector instructions only of loops that touch few arrays (see scan.py)."""
    for d in range(x_row.size):
        x_t[d] = x_row[d] * gate_row[d]
    for d in range(dt_row.size):
        delta_t[d] = softplus(dt_row[d] + bias_row[d], one)


@_inner
def _leave_out_vanished(alive, count, rates, later, exponent, used, vanished):
    """Number of states that remain, moved to the front; one whose decays are all 0 stays so for earlier tokens."""
    remaining = 0
    for m in range(count):
        rates_m, target = rates[m], rates[remaining]
        for d in range(used):
            exponent[d] = later[d] * rates_m[d]
        if _largest(exponent[:used]) > vanished:
            for d in range(WIDTH):
                target[d] = rates_m[d]
            alive[remaining] = alive[m]
            remaining += 1
    return remaining


@_inner
def _score_job(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial, i, block):
    (channels, states), length, dtype = A.shape, partial.shape[2], partial.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    rates, weights = np.zeros((states, WIDTH), dtype), np.zeros(states, dtype)
    alive, count = np.arange(states), states
    later, total, impact = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    x_t, delta_t, exponent = np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype), np.zeros(WIDTH, dtype)
    for d in range(used):
        for n in range(states):
            rates[n, d] = A[first + d, n] * LOG2E  # decays are powers of two
    gate_row, bias_row, C_row = gate[i, first : first + used], dt_bias[first : first + used], C_boundary[i]
    for t in range(length - 1, -1, -1):
        x_at = i * strides[0, 0] + t * strides[0, 1] + first
        dt_at = i * strides[1, 0] + t * strides[1, 1] + first
        B_at = i * strides[2, 0] + t * strides[2, 1]
        # Rows are indexed from 0, so that the compiler can tell that no index is negative.
        x_row, dt_row, B_row = x[x_at : x_at + used], dt[dt_at : dt_at + used], B[B_at : B_at + states]
        _load_token(x_row, gate_row, dt_row, bias_row, one, x_t, delta_t)
        _weigh(alive, count, B_row, C_row, weights)
        total[:] = 0
        _sum_states(rates, weights, count, later, total)
        _impacts(total, delta_t, x_t, later, impact)
        partial[i, block, t] = _reduced(impact[:used], reduce)
        if t % 16 == 0:
            count = _leave_out_vanished(alive, count, rates, later, exponent, used, vanished)


@_compile
def scores(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial):
    """``partial`` (B, blocks, L): per block of channels the maximum, maximum of |.|, or sum of squares.

    ``strides[i]`` holds (batch, token) of x, dt, B; C_boundary (B, N); gate (B, D). ``vanished`` is the power of two
    below which a decay is 0 in this dtype.
    """
    blocks = partial.shape[1]
    for job in numba.prange(partial.shape[0] * blocks):
        _score_job(
            x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial, job // blocks, job % blocks
        )  # fmt: skip
