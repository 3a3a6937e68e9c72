"""Blocks of channels: how the CPU kernels over the state read their inputs.

A block is ``WIDTH`` channels, padded with zeros where a model has fewer, so that the trip count of inner loops is a
constant. Inputs come as flat views with the strides of batch and token, so that slices of a projection need no copy.

Everything is flat and read at offsets. A row of an array would be an object whose references Numba counts, atomically,
as it does those of an array handed to a function that LLVM does not inline: either takes as long as 64 channels.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.elementary import FAST
from simba_lab.kernels.cpu.vectors import LANES, load, prefetch, store

WIDTH = 64
LOG2E = 1.4426950408889634

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def zeros(rows, dtype, width=WIDTH):
    """Flat zeros (rows, width) from the start of a cache line: vectors that straddle two take half as long again."""
    memory = unset(rows, dtype, width)
    memory[:] = 0
    return memory


@_inner
def unset(rows, dtype, width=WIDTH):
    """The same before anything has been written."""
    size = rows * width
    memory = np.empty(size + 64, dtype)
    skip = (-memory.ctypes.data % 64) // memory.itemsize
    return memory[skip : skip + size]


@_inner
def load_rates(A, first, used, dtype, width=WIDTH, rows=0):
    """A (N, width) of a block of channels times log2(e): decays are powers of two. At least ``rows`` rows."""
    rates = zeros(max(A.shape[1], rows), dtype, width)
    for d in range(used):
        for n in range(A.shape[1]):
            rates[n * width + d] = A[first + d, n] * LOG2E
    return rates


@_inner
def load_channels(values, first, used, dtype, width=WIDTH):
    block = zeros(1, dtype, width)
    block[:used] = values[first : first + used]
    return block


@_inner
def move(source, at, count, target, to):
    """``count`` neighbouring numbers of one flat array to another."""
    whole = count // LANES * LANES
    for d in range(0, whole, LANES):
        store(target, to + d, load(source, at + d))
    for d in range(whole, count):
        target[to + d] = source[at + d]


@_inner
def fetch(flat, at, stride, steps, used, ahead, rows, width=WIDTH):
    """``used`` channels of ``steps`` tokens into ``rows`` (steps, width); a token begins ``stride`` after the last.

    Asks for those of the tokens ``ahead``, which come next: a row is too short for the processor to guess what follows.
    """
    for k in range(steps):
        for d in range(0, used, LANES):
            prefetch(flat, at + (k + ahead) * stride + d)
        move(flat, at + k * stride, used, rows, k * width)


@_inner
def put(rows, flat, at, stride, steps, used):
    """The way back: ``rows`` (steps, WIDTH) to where :func:`fetch` would read them."""
    for k in range(steps):
        move(rows, k * WIDTH, used, flat, at + k * stride)
