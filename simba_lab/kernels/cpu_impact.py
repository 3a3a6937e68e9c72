"""Global impact of every token on the boundary, for CPUs, compiled by Numba (Simba; design page, section 3).

Walks from the boundary to the first token with the running sum of steps, so that neither (L, D, N) nor (L, D) is ever
stored. Once every decay of one state in a block of channels is 0 in fp32 it stays 0 for all earlier tokens, and that
state is left out: far from the boundary most of them are.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu_math import FAST, exp, softplus

WIDTH = 32
MAX, ABSMAX, L2 = 0, 1, 2

_compile = numba.njit(parallel=True, cache=True, fastmath=FAST, error_model="numpy")


@_compile
def scores(x, dt, dt_bias, A, B, C_boundary, gate, strides, reduce, vanished, partial):
    """``partial`` (B, blocks, L): per block of channels the maximum, maximum of |.|, or sum of squares.

    ``strides[i]`` holds (batch, token) of x, dt, B; C_boundary (B, N); gate (B, D). ``vanished`` is the exponent below
    which exp is 0 in this dtype.
    """
    batch, blocks, length = partial.shape
    channels, states = A.shape
    one = partial.dtype.type(1)
    zero = one - one
    lowest = partial.dtype.type(-np.inf)
    for job in numba.prange(batch * blocks):
        i, block = job // blocks, job % blocks
        first = block * WIDTH
        used = min(WIDTH, channels - first)
        A_block = np.zeros((states, WIDTH), partial.dtype)
        later = np.zeros(WIDTH, partial.dtype)
        total = np.zeros(WIDTH, partial.dtype)
        x_t = np.zeros(WIDTH, partial.dtype)
        delta_t = np.zeros(WIDTH, partial.dtype)
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
            for d in range(WIDTH):
                total[d] = 0
            for n in range(states):
                if alive[n]:
                    weight = B_row[n] * C_row[n]
                    for d in range(WIDTH):
                        total[d] += exp(later[d] * A_block[n, d]) * weight
            best = lowest if reduce == MAX else zero
            for d in range(used):
                impact = total[d] * delta_t[d] * x_t[d]
                if reduce == L2:
                    best += impact * impact
                else:
                    impact = abs(impact) if reduce == ABSMAX else impact
                    best = impact if impact > best or impact != impact else best  # a NaN wins and stays
                later[d] += delta_t[d]
            partial[i, block, t] = best
            if t % 16 == 0:
                for n in range(states):
                    largest = vanished
                    for d in range(used):
                        largest = max(largest, later[d] * A_block[n, d])
                    alive[n] = largest > vanished
