"""Depthwise causal convolution with SiLU for CPUs, forward and backward, compiled by Numba.

A job is one sequence times one stretch of tokens; inner loops run over channels. The input comes as a flat view with
its strides (batch, token); ``weight`` is passed transposed, (W, D), so that channels are contiguous. ``neighbours``
(B, L) says how many tokens directly before each its taps may read, as in the reference's ``neighbour_conv``; if it is
empty they read all.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import FAST, sigmoid

STRETCH = 64

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _row(x, strides, initial, i, source):
    """Inputs (D,) of token ``source``, which is one of the initial ones if negative.

    Indexed from 0 by loops, so that the compiler can tell that no index is negative and use vector instructions.
    """
    if source < 0:
        return initial[i, source + initial.shape[1]]
    at = i * strides[0] + source * strides[1]
    return x[at : at + initial.shape[2]]


@_inner
def _reach(neighbours, i, t, width):
    """How far back taps of token t read, at most ``width - 1``."""
    return min(width - 1, neighbours[i, t]) if neighbours.size else width - 1


@_inner
def _preactivation(x, strides, weight, bias, initial, reach, i, t, total):
    """``total`` (D,) = bias + sum over taps that reach back no further than ``reach``, for token t of sequence i."""
    width, channels = weight.shape
    for d in range(channels):
        total[d] = bias[d]
    for tap in range(width - 1 - reach, width):
        source = t + tap - (width - 1)
        row = _row(x, strides, initial, i, source)
        for d in range(channels):
            total[d] += weight[tap, d] * row[d]


@kernel
def forward(x, strides, weight, bias, initial, neighbours, out):
    """``out`` (B, L, D) = silu(conv(x)); initial (B, W-1, D) are the inputs before token 0."""
    batch, length, channels = out.shape
    stretches = (length + STRETCH - 1) // STRETCH
    one = out.dtype.type(1)
    for job in numba.prange(batch * stretches):
        i, first = job // stretches, (job % stretches) * STRETCH
        total = np.empty(channels, out.dtype)
        for t in range(first, min(first + STRETCH, length)):
            reach = _reach(neighbours, i, t, weight.shape[0])
            _preactivation(x, strides, weight, bias, initial, reach, i, t, total)
            out_row = out[i, t]
            for d in range(channels):
                out_row[d] = total[d] * sigmoid(total[d], one)


@kernel
def backward(x, strides, weight, bias, initial, neighbours, dout, dinner, dweight, dbias):
    """Gradient ``dinner`` (B, L, D) before SiLU, and per job those of weight (jobs, W, D) and bias (jobs, D)."""
    batch, length, channels = dout.shape
    width = weight.shape[0]
    stretches = (length + STRETCH - 1) // STRETCH
    one = dout.dtype.type(1)
    for job in numba.prange(batch * stretches):
        i, first = job // stretches, (job % stretches) * STRETCH
        total = np.empty(channels, dout.dtype)
        dweight[job] = 0
        dbias[job] = 0
        for t in range(first, min(first + STRETCH, length)):
            reach = _reach(neighbours, i, t, width)
            _preactivation(x, strides, weight, bias, initial, reach, i, t, total)
            dout_row, dinner_row, dbias_job = dout[i, t], dinner[i, t], dbias[job]
            for d in range(channels):
                opened = sigmoid(total[d], one)
                slope = opened * (one + total[d] * (one - opened))
                total[d] = dout_row[d] * slope
                dinner_row[d] = total[d]
                dbias_job[d] += total[d]
            for tap in range(width - 1 - reach, width):
                row, dweight_tap = _row(x, strides, initial, i, t + tap - (width - 1)), dweight[job, tap]
                for d in range(channels):
                    dweight_tap[d] += total[d] * row[d]


@kernel
def spread(dinner, weight, neighbours, dx, dinitial):
    """Gradients of x (B, L, D) and of the initial inputs (B, W-1, D) from the one before SiLU."""
    batch, length, channels = dinner.shape
    width = weight.shape[0]
    stretches = (length + width - 1 + STRETCH - 1) // STRETCH
    for job in numba.prange(batch * stretches):
        i, first = job // stretches, (job % stretches) * STRETCH - (width - 1)
        total = np.empty(channels, dinner.dtype)
        for source in range(first, min(first + STRETCH, length)):
            total[:] = 0
            for tap in range(width):
                t = source + (width - 1) - tap
                if t >= 0 and t < length and _reach(neighbours, i, t, width) >= t - source:
                    dinner_row = dinner[i, t]
                    for d in range(channels):
                        total[d] += weight[tap, d] * dinner_row[d]
            if source >= 0:
                dx[i, source] = total
            else:
                dinitial[i, source + width - 1] = total
