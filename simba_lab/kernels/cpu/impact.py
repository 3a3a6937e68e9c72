"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that (L, D, N) is never stored. Once every
decay of one state in ``LANES`` neighbouring channels is 0 in fp32 it stays 0 for all earlier tokens, and that state is
left out there.

Channels are folded onto each other lane by lane; torch reduces the ``LANES`` lanes that remain.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import WIDTH, fetch, load_channels, load_rates, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import FAST, exp2, larger, softplus
from simba_lab.kernels.cpu.vectors import LANES, all_at_most, highest, load, store

GROUP = 2
"""Blocks of channels folded onto each other by one job."""
CHUNK = 64
"""Tokens done together; states are then looked at again."""
MAX, ABSMAX, L2 = 0, 1, 2
FORGETS = -1e30
"""Rate of channels that pad a block: no state of theirs outlives a step."""

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _prepare(dt_c, bias_block, x_c, gate_block, steps, one, later, later_c, u_c):
    """Products of step size, x and the channel's weight, and the sums of the steps after each token.

    ``later`` (WIDTH,) are the sums of the steps after the chunk, in whose place come those that include it.
    """
    for d in range(0, WIDTH, LANES):
        bias, gate, after = load(bias_block, d), load(gate_block, d), load(later, d)
        for k in range(steps - 1, -1, -1):
            at = k * WIDTH + d
            delta = softplus(load(dt_c, at) + bias, one)
            store(u_c, at, delta * load(x_c, at) * gate)
            store(later_c, at, after)
            after += delta
        store(later, d, after)


@_inner
def _impacts(rates, d, alive, count, weights, later_c, u_c, steps, impact_c):
    """``impact_c`` (steps, LANES) in the channels at ``d``: decays, weighted and added over ``count`` states."""
    states = rates.size // WIDTH
    for k in range(steps):
        later, u = load(later_c, k * WIDTH + d), load(u_c, k * WIDTH + d)
        total = u - u
        for m in range(count):
            n = alive[m]
            total += exp2(later * load(rates, n * WIDTH + d)) * weights[k * states + n]
        store(impact_c, k * LANES, total * u)


@_inner
def _fold(impact_c, steps, reduce, lanes, to):
    """Maximum, maximum of |.| or sum of squares with what the lanes hold; a NaN on either side stays one."""
    if reduce == MAX:
        for at in range(0, steps * LANES, LANES):
            store(lanes, to + at, highest(load(lanes, to + at), load(impact_c, at)))
    elif reduce == ABSMAX:
        for at in range(0, steps * LANES, LANES):
            impact = load(impact_c, at)
            store(lanes, to + at, highest(load(lanes, to + at), larger(impact, -impact)))
    else:
        for at in range(0, steps * LANES, LANES):
            impact = load(impact_c, at)
            store(lanes, to + at, load(lanes, to + at) + impact * impact)


@_inner
def _leave_out_vanished(alive, count, rates, d, later, vanished):
    """Number of states that remain, moved to the front; one whose decays are all 0 stays so for earlier tokens."""
    remaining, sums = 0, load(later, d)
    for m in range(count):
        n = alive[m]
        if not all_at_most(sums * load(rates, n * WIDTH + d), vanished):
            alive[remaining] = n
            remaining += 1
    return remaining


@_inner
def _score_block(x, dt, dt_bias, A, B, C_boundary, gate, strides, length, reduce, vanished, i, block, lanes, start):
    (channels, states), dtype = A.shape, lanes.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    one = dtype.type(1)
    rates = load_rates(A, first, used, dtype)
    for n in range(states):
        rates[n * WIDTH + used : (n + 1) * WIDTH] = FORGETS
    bias_block, gate_block = load_channels(dt_bias, first, used, dtype), load_channels(gate[i], first, used, dtype)
    x_c, dt_c, u_c, later_c = zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype), zeros(CHUNK, dtype)
    later, weights, impact_c = zeros(1, dtype), zeros(CHUNK, dtype, states), zeros(CHUNK, dtype, LANES)
    alive, counts = np.empty((WIDTH // LANES, states), np.int64), np.full(WIDTH // LANES, states)
    alive[:] = np.arange(states)
    for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
        steps = min(CHUNK, length - t0)
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, -CHUNK, x_c)
        fetch(dt, i * strides[1, 0] + t0 * strides[1, 1] + first, strides[1, 1], steps, used, -CHUNK, dt_c)
        for k in range(steps):
            for n in range(states):
                weights[k * states + n] = B[i * strides[2, 0] + (t0 + k) * strides[2, 1] + n] * C_boundary[i, n]
        _prepare(dt_c, bias_block, x_c, gate_block, steps, one, later, later_c, u_c)
        for part in range(-(-used // LANES)):
            d = part * LANES
            _impacts(rates, d, alive[part], counts[part], weights, later_c, u_c, steps, impact_c)
            if reduce == MAX:  # lanes that are no channels hold 0, which may not be the maximum
                for lane in range(used - d, LANES):
                    impact_c[lane : steps * LANES : LANES] = impact_c[0 : steps * LANES : LANES]
            _fold(impact_c, steps, reduce, lanes, start + t0 * LANES)
            counts[part] = _leave_out_vanished(alive[part], counts[part], rates, d, later, vanished)


@kernel
def scores(x, dt, dt_bias, A, B, C_boundary, gate, strides, length, reduce, vanished, groups, lanes):
    """``lanes`` (B groups L LANES,): maximum, maximum of |.| or sum of squares over every LANES-th channel of a group.

    ``strides[i]`` holds (batch, token) of x, dt, B; C_boundary (B, N); gate (B, D). ``vanished`` is the power of two
    below which a decay is 0 in this dtype. The lanes come filled with what an empty reduction gives.
    """
    blocks = (A.shape[0] + WIDTH - 1) // WIDTH
    for job in numba.prange(gate.shape[0] * groups):
        i, group = job // groups, job % groups
        for block in range(group * GROUP, min(blocks, (group + 1) * GROUP)):
            _score_block(
                x, dt, dt_bias, A, B, C_boundary, gate, strides, length, reduce, vanished, i, block, lanes,
                job * length * LANES,
            )  # fmt: skip
