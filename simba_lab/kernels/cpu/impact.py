"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that (L, D, N) is never stored. Once every
decay of one state in ``LANES`` neighbouring channels is 0 in fp32 it stays 0 for all earlier tokens, and that state is
left out there.

Channels are folded onto each other lane by lane, and the lanes that remain are reduced once per token.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import fetch, load_channels, load_rates, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import FAST, exp2, larger, softplus
from simba_lab.kernels.cpu.vectors import LANES, all_at_most, entry, highest, load, maximum, store, total

WIDTH = 128
"""Channels of a job."""
CHUNK = 32
"""Tokens done together; states are looked at again after each chunk."""
MAX, ABSMAX, L2 = 0, 1, 2
REDUCTIONS = {"max": MAX, "absmax": ABSMAX, "l2": L2}
FORGETS = -1e30
"""Rate of channels that pad a vector: no state of theirs outlives a step."""

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
def _leave_out_vanished(rates, d, alive, count, last, vanished):
    """Number of states that remain, moved to the front; one whose decays are all 0 stays so for earlier tokens.

    ``last`` (WIDTH,) are the sums of the steps after the chunk.
    """
    remaining, later = 0, load(last, d)
    for m in range(count):
        n = alive[m]
        if not all_at_most(later * load(rates, n * WIDTH + d), vanished):
            alive[remaining] = n
            remaining += 1
    return remaining


@_inner
def _impacts(rates, d, alive, count, weights, at, later_c, u_c, steps, impact_c):
    """``impact_c`` (steps, LANES) in the channels at ``d``: decays, weighted and added over ``count`` states.

    Two tokens at a time: either sum alone waits for itself.
    """
    states = rates.size // WIDTH
    for k in range(0, steps, 2):
        other = min(k + 1, steps - 1)
        own, others = k * WIDTH + d, other * WIDTH + d
        later, later_2 = load(later_c, own), load(later_c, others)
        total_1 = total_2 = later - later
        for m in range(count):
            n = entry(alive, m)
            rate = load(rates, n * WIDTH + d)
            total_1 += exp2(later * rate) * entry(weights, at + k * states + n)
            total_2 += exp2(later_2 * rate) * entry(weights, at + other * states + n)
        store(impact_c, k * LANES, total_1 * load(u_c, own))
        store(impact_c, other * LANES, total_2 * load(u_c, others))


@_inner
def fold(impact_c, steps, reduce, found_c):
    """Maximum, maximum of |.| or sum of squares with what has been found; a NaN on either side stays one."""
    for at in range(0, steps * LANES, LANES):
        impact, found = load(impact_c, at), load(found_c, at)
        if reduce == MAX:
            store(found_c, at, highest(found, impact))
        elif reduce == ABSMAX:
            store(found_c, at, highest(found, larger(impact, -impact)))
        else:
            store(found_c, at, found + impact * impact)


@_inner
def reduce_lanes(found_c, steps, reduce, best, to):
    """One number per token in ``best`` from ``to`` on."""
    for k in range(steps):
        found = load(found_c, k * LANES)
        best[to + k] = total(found) if reduce == L2 or not all_at_most(found, np.inf) else maximum(found)


@_inner
def _job(x, dt, dt_bias, A, weights, gate, strides, length, reduce, vanished, i, block, best, to):
    (channels, states), dtype = A.shape, best.dtype
    first = block * WIDTH
    used = min(WIDTH, channels - first)
    parts, one = -(-used // LANES), dtype.type(1)
    rates = load_rates(A, first, used, dtype, WIDTH)
    for n in range(states):
        rates[n * WIDTH + used : (n + 1) * WIDTH] = FORGETS
    bias_block = load_channels(dt_bias, first, used, dtype, WIDTH)
    gate_block = load_channels(gate[i], first, used, dtype, WIDTH)
    x_c, dt_c = zeros(CHUNK, dtype, WIDTH), zeros(CHUNK, dtype, WIDTH)
    u_c, later_c = zeros(CHUNK, dtype, WIDTH), zeros(CHUNK, dtype, WIDTH)
    later, impact_c, found_c = zeros(1, dtype, WIDTH), zeros(CHUNK, dtype, LANES), zeros(CHUNK, dtype, LANES)
    alive, counts = np.empty((parts, states), np.int64), np.full(parts, states)
    alive[:] = np.arange(states)
    for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
        steps = min(CHUNK, length - t0)
        fetch(x, i * strides[0, 0] + t0 * strides[0, 1] + first, strides[0, 1], steps, used, -CHUNK, x_c, WIDTH)
        fetch(dt, i * strides[1, 0] + t0 * strides[1, 1] + first, strides[1, 1], steps, used, -CHUNK, dt_c, WIDTH)
        for part in range(parts):
            counts[part] = _leave_out_vanished(rates, part * LANES, alive[part], counts[part], later, vanished)
        _prepare(dt_c, bias_block, x_c, gate_block, steps, one, later, later_c, u_c)
        found_c[:] = -np.inf if reduce == MAX else 0
        for part in range(parts):
            d, at = part * LANES, (i * length + t0) * states
            _impacts(rates, d, alive[part], counts[part], weights, at, later_c, u_c, steps, impact_c)
            if reduce == MAX:  # lanes that are no channels hold 0, which may not be the maximum
                for lane in range(used - d, LANES):
                    impact_c[lane : steps * LANES : LANES] = impact_c[0 : steps * LANES : LANES]
            fold(impact_c, steps, reduce, found_c)
        reduce_lanes(found_c, steps, reduce, best, to + t0)


@kernel
def scores(x, dt, dt_bias, A, weights, gate, strides, length, reduce, vanished, jobs, best):
    """``best`` (B jobs L,): maximum, maximum of |.| or sum of squares over the ``WIDTH`` channels of a job.

    ``strides[i]`` holds (batch, token) of x and dt; weights (B L N,) are products of B with the boundary's C; gate
    (B, D). ``vanished`` is the power of two from which on down a decay counts as 0.
    """
    for job in numba.prange(gate.shape[0] * jobs):
        i, block = job // jobs, job % jobs
        before = flush_denormals()
        _job(x, dt, dt_bias, A, weights, gate, strides, length, reduce, vanished, i, block, best, job * length)
        restore_denormals(before)
