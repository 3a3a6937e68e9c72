"""Pieces that several Triton kernels are made of: special functions, and time steps taken out of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

STEPS = tl.constexpr(8)
"""Time steps that :func:`unstack` takes out of a tile."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(v, FAST: tl.constexpr):
    """2^v in fp32; subnormal results are flushed to zero. FAST is False in Triton's interpreter, which knows no PTX."""
    if FAST:
        # tl.exp2 also keeps subnormal results, at the price of three more instructions for every exponential.
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [v], tl.float32, is_pure=True, pack=1)
    return tl.exp2(v)


@triton.jit
def log2(v, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [v], tl.float32, is_pure=True, pack=1)
    return tl.log2(v)


@triton.jit
def reciprocal(v, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [v], tl.float32, is_pure=True, pack=1)
    return 1.0 / v


@triton.jit
def sigmoid(v, FAST: tl.constexpr):
    return reciprocal(1.0 + exp2(v * (-LOG2E), FAST), FAST)


@triton.jit
def softplus(v, FAST: tl.constexpr):
    """log(1 + e^v). Where e^v is small, 1 + e^v has lost it: a series takes over (relative error below 2e-8)."""
    e = exp2(v * LOG2E, FAST)
    series = e * (1.0 - e * (0.5 - e * (0.3333333432674408 - e * 0.25)))
    exact = log2(1.0 + e, FAST) * LN2
    return tl.where(v > 20.0, v, tl.where(e < 0.015625, series, exact))


@triton.jit
def _first(a, b):
    return a


@triton.jit
def pin(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``tile`` itself, computed where its elements are spread over all threads.

    The compiler moves a change of layout from a value to what it is computed from. Behind :func:`unstack` every value
    is held by several threads, and each of them would compute it anew, special functions included. It does not move a
    change of layout past a scan; over an axis of one element a scan costs nothing.
    """
    return tl.reshape(tl.associative_scan(tl.reshape(tile, (ROWS, COLUMNS, 1)), 2, _first), (ROWS, COLUMNS))


@triton.jit
def unstack(tile, COLUMNS: tl.constexpr):
    """The eight rows (COLUMNS,) of a tile (8, COLUMNS)."""
    even, odd = tl.split(tl.reshape(tl.trans(tile), (COLUMNS, 4, 2)))
    r04, r26 = tl.split(tl.reshape(even, (COLUMNS, 2, 2)))
    r15, r37 = tl.split(tl.reshape(odd, (COLUMNS, 2, 2)))
    r0, r4 = tl.split(r04)
    r2, r6 = tl.split(r26)
    r1, r5 = tl.split(r15)
    r3, r7 = tl.split(r37)
    return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def _join(parts):
    """Eight tensors as one, with three more axes of two whose order is that of the eight."""
    even = tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6]))
    odd = tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7]))
    return tl.join(even, odd)


@triton.jit
def sum_channels(parts, CHANNELS: tl.constexpr, STATES: tl.constexpr):
    """(8, STATES): the sums over channels of eight tiles (CHANNELS, STATES).

    Folding in halves, with all eight at hand, moves every element once; a sum of each would move it three times.
    """
    tile = tl.reshape(_join(parts), (CHANNELS, STATES * 8))
    tile = _fold(tile, CHANNELS, STATES * 8)
    if CHANNELS > 2:
        tile = _fold(tile, CHANNELS // 2, STATES * 8)
    if CHANNELS > 4:
        tile = _fold(tile, CHANNELS // 4, STATES * 8)
    return tl.trans(tl.reshape(tl.sum(tile, 0), (STATES, 8)))


@triton.jit
def _fold(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    upper, lower = tl.split(tl.permute(tl.reshape(tile, (2, ROWS // 2, COLUMNS)), (1, 2, 0)))
    return upper + lower


@triton.jit
def stack(rows, COLUMNS: tl.constexpr):
    """The tile (8, COLUMNS) of eight rows (COLUMNS,): the inverse of :func:`unstack`."""
    return tl.trans(tl.reshape(_join(rows), (COLUMNS, 8)))
