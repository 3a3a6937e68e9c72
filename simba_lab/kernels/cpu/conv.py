"""Depthwise causal convolution with SiLU for CPUs, forward and backward, compiled by Numba.

A job is one sequence times one stretch of tokens, done ``CHUNK`` tokens at a time in scratch memory whose rows are
padded to whole vectors. The input comes as a flat view with its strides (batch, token); ``weight`` is passed
transposed, (W, D), so that channels are contiguous. ``neighbours`` (B, L) says how many tokens directly before each its
taps may read, as in the reference's ``neighbour_conv``; if it is empty they read all.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.blocks import move, zeros
from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.elementary import FAST, sigmoid
from simba_lab.kernels.cpu.vectors import LANES, load, store

STRETCH = 128
CHUNK = 16

_inner = numba.njit(fastmath=FAST, error_model="numpy")


@_inner
def _padded(rows, dtype):
    """The rows of an array, each padded with zeros to whole vectors; flat."""
    channels = rows.shape[1]
    line = -(-channels // LANES) * LANES
    out = zeros(rows.shape[0], dtype, line)
    for i in range(rows.shape[0]):
        out[i * line : i * line + channels] = rows[i]
    return out


@_inner
def _fetch_inputs(x, strides, initial, i, t0, steps, line, x_c):
    """Tokens from ``W - 1`` before ``t0`` on; those before the first are the initial ones."""
    before, channels = initial.shape[1], initial.shape[2]
    for r in range(steps + before):
        source = t0 + r - before
        if source < 0:
            for d in range(channels):
                x_c[r * line + d] = initial[i, before + source, d]
        else:
            move(x, i * strides[0] + source * strides[1], channels, x_c, r * line)


@_inner
def _reaches(neighbours, i, t0, steps, length, before, reach):
    """How far back the taps of each token read, at most ``before``; -1 beyond the last token."""
    for k in range(steps):
        reach[k] = before if t0 + k < length else -1
        if neighbours.size and t0 + k < length:
            reach[k] = min(before, neighbours[i, t0 + k])


@_inner
def _convolve(x_c, taps, bias, reach, steps, before, line, one, out_c):
    for k in range(steps):
        for d in range(0, line, LANES):
            value = load(bias, d)
            for tap in range(before - reach[k], before + 1):
                value += load(taps, tap * line + d) * load(x_c, (k + tap) * line + d)
            store(out_c, k * line + d, value * sigmoid(value, one))


@_inner
def _forward_job(x, strides, taps, bias, initial, neighbours, length, i, first, end, out):
    before, channels, dtype = initial.shape[1], initial.shape[2], out.dtype
    line, one = bias.size, dtype.type(1)
    x_c, out_c = zeros(CHUNK + before, dtype, line), zeros(CHUNK, dtype, line)
    reach = np.empty(CHUNK, np.int64)
    for t0 in range(first, end, CHUNK):
        steps = min(CHUNK, end - t0)
        _fetch_inputs(x, strides, initial, i, t0, steps, line, x_c)
        _reaches(neighbours, i, t0, steps, length, before, reach)
        _convolve(x_c, taps, bias, reach, steps, before, line, one, out_c)
        for k in range(steps):
            move(out_c, k * line, channels, out, (i * length + t0 + k) * channels)


@kernel
def forward(x, strides, weight, bias, initial, neighbours, length, out):
    """``out`` (B L D,) = silu(conv(x)); bias (1, D); initial (B, W-1, D) are the inputs before token 0."""
    stretches = (length + STRETCH - 1) // STRETCH
    for job in numba.prange(initial.shape[0] * stretches):
        i, first = job // stretches, (job % stretches) * STRETCH
        taps, shift = _padded(weight, out.dtype), _padded(bias, out.dtype)
        end = min(first + STRETCH, length)
        _forward_job(x, strides, taps, shift, initial, neighbours, length, i, first, end, out)


@_inner
def _before_silu(x_c, taps, bias, reach, steps, before, line, one, g_c):
    """In place of ``g_c`` (steps, line), the gradient of the output, that before SiLU."""
    for k in range(steps):
        for d in range(0, line, LANES):
            value = load(bias, d)
            for tap in range(before - reach[k], before + 1):
                value += load(taps, tap * line + d) * load(x_c, (k + tap) * line + d)
            opened = sigmoid(value, one)
            store(g_c, k * line + d, load(g_c, k * line + d) * opened * (one + value * (one - opened)))


@_inner
def _weight_gradients(x_c, g_c, reach, steps, before, line, dtaps, dbias):
    for k in range(steps):
        for d in range(0, line, LANES):
            g = load(g_c, k * line + d)
            store(dbias, d, load(dbias, d) + g)
            for tap in range(before - reach[k], before + 1):
                at = tap * line + d
                store(dtaps, at, load(dtaps, at) + g * load(x_c, (k + tap) * line + d))


@_inner
def _spread(g_c, taps, reach, k, ahead, before, line, dx_c, to):
    """Gradient of the input that token ``k`` of a chunk reads ``ahead`` tokens before its own."""
    for d in range(0, line, LANES):
        total = load(g_c, d) - load(g_c, d)
        for back in range(ahead, before + 1):
            if reach[k + back - ahead] >= back:
                total += load(taps, (before - back) * line + d) * load(g_c, (k + back - ahead) * line + d)
        store(dx_c, to + d, total)


@_inner
def _backward_job(
    x, strides, taps, bias, initial, neighbours, dout, length, i, first, end, dx, dtaps, dbias, dinitial
):  # fmt: skip
    """Chunks from the last to the first: each leaves to the one before it what its first ``W - 1`` tokens pass on."""
    before, channels, dtype = initial.shape[1], initial.shape[2], dx.dtype
    line, one = bias.size, dtype.type(1)
    x_c, g_c = zeros(CHUNK + 2 * before, dtype, line), zeros(CHUNK + before, dtype, line)
    dx_c, reach = zeros(1, dtype, line), np.empty(CHUNK + before, np.int64)
    for t0 in range(first + (end - 1 - first) // CHUNK * CHUNK, first - 1, -CHUNK):
        steps = min(CHUNK, end - t0)
        # The tokens after the stretch belong to another job, which counts their weights.
        fresh = min(before, length - end) + steps if t0 + steps == end else steps
        _reaches(neighbours, i, t0, steps + before, length, before, reach)
        _fetch_inputs(x, strides, initial, i, t0, fresh, line, x_c)
        for k in range(fresh):
            move(dout, (i * length + t0 + k) * channels, channels, g_c, k * line)
        _before_silu(x_c, taps, bias, reach, fresh, before, line, one, g_c)
        _weight_gradients(x_c, g_c, reach, steps, before, line, dtaps, dbias)
        for k in range(steps):
            _spread(g_c, taps, reach, k, 0, before, line, dx_c, 0)
            move(dx_c, 0, channels, dx, (i * length + t0 + k) * channels)
        if t0 == 0:
            for source in range(before):
                _spread(g_c, taps, reach, 0, before - source, before, line, dx_c, 0)
                dinitial[i, source] = dx_c[:channels]
        for at in range(before * line):  # the chunk before this one is whole
            g_c[CHUNK * line + at] = g_c[at]


@kernel
def backward(x, strides, weight, bias, initial, neighbours, dout, length, dx, dweight, dbias, dinitial):
    """Gradients ``dx`` (B L D,), of the initial inputs (B, W-1, D), and per job those of weight and bias.

    dweight (jobs, W, D) and dbias (jobs, D) are to be added up; dinitial comes filled with 0.
    """
    stretches = (length + STRETCH - 1) // STRETCH
    dtype, channels = dx.dtype, initial.shape[2]
    for job in numba.prange(initial.shape[0] * stretches):
        i, first = job // stretches, (job % stretches) * STRETCH
        taps, shift = _padded(weight, dtype), _padded(bias, dtype)
        dtaps, dshift = zeros(weight.shape[0], dtype, shift.size), zeros(1, dtype, shift.size)
        end = min(first + STRETCH, length)
        _backward_job(
            x, strides, taps, shift, initial, neighbours, dout, length, i, first, end, dx, dtaps, dshift, dinitial
        )  # fmt: skip
        for tap in range(weight.shape[0]):
            dweight[job, tap] = dtaps[tap * shift.size : tap * shift.size + channels]
        dbias[job] = dshift[:channels]
