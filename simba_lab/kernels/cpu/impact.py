"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that (L, D, N) is never stored. Once every
decay of one state in a block of channels is 0 in fp32 it stays 0 for all earlier tokens, and that state is left out.

LLVM makes no vector instructions of a maximum over a row, nor of loops that touch many arrays. So blocks of channels
are folded onto each other lane by lane, torch reduces the ``WIDTH`` lanes that remain, and loops here are small.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import WIDTH, copy, load_channels, load_rates, row, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import FAST, exp2, softplus

GROUP = 2
"""Blocks of channels folded onto each other by one job."""
CHUNK = 64
"""Tokens whose inputs are fetched together, so that the waits for memory overlap; states are then looked at again."""
MAX, ABSMAX, L2 = 0, 1, 2

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _step_and_input(dt_t, bias_block, x_t, gate_block, one, delta_t, u_t):
    """Step size of one token and its product with x and the channel's weight."""
    for d in range(WIDTH):
        delta = softplus(dt_t[d] + bias_block[d], one)
        delta_t[d] = delta
        u_t[d] = delta * x_t[d] * gate_block[d]


@_inner
def _load(flat, strides, i, stop, steps, first, used, rows):
    """The block's channels of ``steps`` tokens, backwards from the one before ``stop``."""
    for k in range(steps):
        copy(row(flat, strides, i, stop - 1 - k, first, used), rows[k])


@_inner
def _weigh(alive, count, B_t, C_i, weights):
    for m in range(count):
        weights[m] = B_t[alive[m]] * C_i[alive[m]]


@_inner
def _sum_states(rates, weights, count, later, total):
    """``total`` (WIDTH,): the decays of one token, weighted and added over the states."""
    for d in range(WIDTH):
        total[d] = 0
    for m in range(count):
        weight, rates_m = weights[m], rates[m]
        for d in range(WIDTH):
            total[d] += exp2(later[d] * rates_m[d]) * weight


@_inner
def _impacts(total, delta_t, u_t, later):
    """In place of ``total`` the impact of one token, per channel of the block; ``later`` moves on."""
    for d in range(WIDTH):
        total[d] *= u_t[d]
    for d in range(WIDTH):
        later[d] += delta_t[d]


@_inner
def _fold(impact, reduce, lanes):
    """Maximum, maximum of |.| or sum of squares with what the lanes hold; a NaN on either side stays one."""
    if reduce == L2:
        for d in range(impact.size):
            lanes[d] += impact[d] * impact[d]
    elif reduce == ABSMAX:
        for d in range(impact.size):
            value, best = abs(impact[d]), lanes[d]
            lanes[d] = best if best > value or best != best else value
    else:
        for d in range(impact.size):
            value, best = impact[d], lanes[d]
            lanes[d] = best if best > value or best != best else value


@_inner
def _leave_out_vanished(alive, count, rates, later, used, vanished):
    """Number of states that remain, moved to the front; one whose decays are all 0 stays so for earlier tokens."""
    remaining = 0
    for m in range(count):
        rates_m, target = rates[m], rates[remaining]
        largest = later[0] * rates_m[0]
        for d in range(used):
            exponent = later[d] * rates_m[d]
            largest = largest if largest > exponent else exponent
        if not largest <= vanished:
            for d in range(WIDTH):
                target[d] = rates_m[d]
            alive[remaining] = alive[m]
            remaining += 1
    return remaining


@_inner
def _score_block(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, i, block, lanes):
    (channels, states), length, dtype = A.shape, lanes.shape[0], lanes.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    rates, weights = load_rates(A, first, used, dtype), np.zeros(states, dtype)
    alive, count = np.arange(states), states
    bias_block, gate_block = load_channels(dt_bias, first, used, dtype), load_channels(gate[i], first, used, dtype)
    rows, x_c, dt_c = zeros(4, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    delta_t, u_t, later, total = rows[0], rows[1], rows[2], rows[3]
    for stop in range(length, 0, -CHUNK):
        steps = min(CHUNK, stop)
        _load(x, strides[0], i, stop, steps, first, used, x_c)
        _load(dt, strides[1], i, stop, steps, first, used, dt_c)
        for k in range(steps):
            t = stop - 1 - k
            _step_and_input(dt_c[k], bias_block, x_c[k], gate_block, one, delta_t, u_t)
            _weigh(alive, count, row(B, strides[2], i, t, 0, states), C_boundary[i], weights)
            _sum_states(rates, weights, count, later, total)
            _impacts(total, delta_t, u_t, later)
            _fold(total[:used], reduce, lanes[t])
        count = _leave_out_vanished(alive, count, rates, later, used, vanished)


@kernel
def scores(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, lanes):
    """``lanes`` (B, jobs, L, WIDTH): maximum, maximum of |.| or sum of squares over every WIDTH-th channel of a group.

    ``strides[i]`` holds (batch, token) of x, dt, B; C_boundary (B, N); gate (B, D). ``vanished`` is the power of two
    below which a decay is 0 in this dtype. The lanes come filled with what an empty reduction gives.
    """
    groups, blocks = lanes.shape[1], (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(lanes.shape[0] * groups):
        i, group = job // groups, job % groups
        for block in range(group * GROUP, min(blocks, (group + 1) * GROUP)):
            _score_block(
                x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, i, block, lanes[i, group]
            )  # fmt: skip
