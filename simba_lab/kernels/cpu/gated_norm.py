"""RMS norm of a gated output, as Mamba-2 has it, for CPUs, forward and backward, compiled by Numba.

Rows are tokens; a job is a stretch of them. Each group of channels has a norm of its own.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import sigmoid

STRETCH = 32


@kernel
def forward(y, z, weight, eps, out, inverse):
    """``inverse`` (rows, groups) = 1 / rms of g = y silu(z) over each group, ``out`` (rows, D) = g inverse weight."""
    rows, groups = inverse.shape
    width = y.shape[1] // groups
    one = y.dtype.type(1)
    for job in numba.prange((rows + STRETCH - 1) // STRETCH):
        for row in range(job * STRETCH, min(rows, (job + 1) * STRETCH)):
            for group in range(groups):
                run = slice(group * width, (group + 1) * width)
                y_, z_, weight_, out_ = y[row, run], z[row, run], weight[run], out[row, run]
                total = one - one
                for d in range(width):
                    gated = y_[d] * z_[d] * sigmoid(z_[d], one)
                    out_[d] = gated
                    total += gated * gated
                scale = one / np.sqrt(total / width + eps)
                inverse[row, group] = scale
                for d in range(width):
                    out_[d] *= scale * weight_[d]


@kernel
def backward(y, z, weight, inverse, dout, dy, dz, dweight):
    """``dy``, ``dz`` (rows, D) and ``dweight`` (jobs, D), to be added up."""
    rows, groups = inverse.shape
    width = y.shape[1] // groups
    one = y.dtype.type(1)
    for job in numba.prange(dweight.shape[0]):
        dweight[job] = 0
        for row in range(job * STRETCH, min(rows, (job + 1) * STRETCH)):
            for group in range(groups):
                run = slice(group * width, (group + 1) * width)
                y_, z_, dout_, weight_ = y[row, run], z[row, run], dout[row, run], weight[run]
                dy_, dz_, dweight_ = dy[row, run], dz[row, run], dweight[job, run]
                scale = inverse[row, group]
                total = one - one
                for d in range(width):
                    share = sigmoid(z_[d], one)
                    silu = z_[d] * share
                    gated = y_[d] * silu
                    dweight_[d] += dout_[d] * gated * scale
                    total += dout_[d] * weight_[d] * gated
                    dy_[d] = silu
                    dz_[d] = share * (one + z_[d] - silu)  # the derivative of silu
                pull = total * scale * scale * scale / width
                for d in range(width):
                    dgated = dout_[d] * weight_[d] * scale - y_[d] * dy_[d] * pull
                    dz_[d] *= dgated * y_[d]
                    dy_[d] *= dgated
