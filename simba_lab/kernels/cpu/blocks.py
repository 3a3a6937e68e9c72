"""Blocks of channels: how the CPU kernels over the state read their inputs.

A block is ``WIDTH`` channels, padded with zeros where a model has fewer, so that the trip count of inner loops is a
constant. Inputs come as flat views with the strides of batch and token, so that slices of a projection need no copy.
LLVM makes vector instructions of a loop only if at most eight comparisons of addresses show that the arrays it writes
overlap no other: rows of inputs and outputs are copied by loops of their own.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.elementary import FAST

WIDTH = 64
LOG2E = 1.4426950408889634

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def zeros(rows, dtype):
    """Zeros (rows, WIDTH) that start with a cache line: vectors that straddle two lines take half as long again."""
    size = rows * WIDTH
    memory = np.zeros(size + 64, dtype)
    skip = (-memory.ctypes.data % 64) // memory.itemsize
    return memory[skip : skip + size].reshape(rows, WIDTH)


@_inner
def load_rates(A, first, used, dtype):
    """A (N, WIDTH) of a block of channels times log2(e): decays are powers of two."""
    rates = zeros(A.shape[1], dtype)
    for d in range(used):
        for n in range(A.shape[1]):
            rates[n, d] = A[first + d, n] * LOG2E
    return rates


@_inner
def load_channels(values, first, used, dtype):
    block = zeros(1, dtype)[0]
    block[:used] = values[first : first + used]
    return block


@_inner
def row(flat, strides, i, t, first, used):
    """``used`` entries from ``first`` on of token t of sequence i.

    Loops index rows from 0, which the compiler knows to be in range; an index it cannot tell from a negative one,
    which Python counts from the end, would keep it from using vector instructions.
    """
    at = i * strides[0] + t * strides[1] + first
    return flat[at : at + used]


@_inner
def copy(source, target):
    """The channels of ``source``, which may be fewer than the target's."""
    for d in range(source.size):
        target[d] = source[d]
