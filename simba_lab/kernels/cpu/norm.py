"""Residual addition and RMS norm in one pass, for CPUs, forward and backward, compiled by Numba.

Rows are tokens; a job is a stretch of them. Norms accumulate in the dtype of the residual stream.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.compiled import kernel

STRETCH = 128


@kernel
def forward(hidden, residual, has_residual, index, weight, eps, normed, stream, inverse):
    """``stream`` (rows, M) = residual + hidden, ``inverse`` (rows,) = 1 / rms, ``normed`` = stream inverse weight.

    ``index`` (rows,) says which rows of hidden and residual to take; empty, all of them.
    """
    rows, width = stream.shape
    one = stream.dtype.type(1)
    for job in numba.prange((rows + STRETCH - 1) // STRETCH):
        for row in range(job * STRETCH, min(rows, (job + 1) * STRETCH)):
            total, of = one - one, index[row] if index.size else row
            for m in range(width):
                value = hidden[of, m] + residual[of, m] if has_residual else hidden[of, m]
                stream[row, m] = value
                total += value * value
            scale = one / np.sqrt(total / width + eps)
            inverse[row] = scale
            for m in range(width):
                normed[row, m] = stream[row, m] * scale * weight[m]


@kernel
def backward(stream, inverse, weight, dnormed, dstream, dinput, dweight):
    """``dinput`` (rows, M), the gradient of hidden and of residual alike; ``dweight`` (jobs, M), to be added up."""
    rows, width = stream.shape
    one = stream.dtype.type(1)
    for job in numba.prange(dweight.shape[0]):
        dweight[job] = 0
        for row in range(job * STRETCH, min(rows, (job + 1) * STRETCH)):
            scale = inverse[row]
            total = one - one
            for m in range(width):
                total += dnormed[row, m] * weight[m] * stream[row, m]
            pull = total * scale * scale * scale / width
            for m in range(width):
                dweight[job, m] += dnormed[row, m] * stream[row, m] * scale
                dinput[row, m] = dstream[row, m] + dnormed[row, m] * weight[m] * scale - stream[row, m] * pull
