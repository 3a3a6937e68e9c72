"""Elementary functions that LLVM can vectorise inside the CPU kernels.

``math.exp`` on a float32 is a scalar library call; the polynomials here inline into the loops over channels, which is
what makes the scan fast. They take the vectors of :mod:`simba_lab.kernels.cpu.vectors` too. Relative error below 5e-7
in fp32; fp64 arguments take the library functions, so that gradient checks in fp64 see no approximation.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

# No nnan or ninf: a NaN that enters the kernels must come out of them.
FAST = {"contract", "nsz", "arcp", "reassoc"}

f32 = np.float32
LOG2E = f32(1.4426950408889634)
# ln 2 in two parts, so that x - k ln 2 keeps its low bits (Cody and Waite).
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
# Beyond these exp leaves fp32's normal range; decays below it count as 0 in any sum of the scan.
EXP_LOW, EXP_HIGH = f32(-87.0), f32(88.0)
EXP2_LOW = f32(-125.0)
# Added to a number below 2^22, it leaves no room for digits after the point and puts the integer in the lowest bits.
ROUND = f32(1.5 * 2**23)
# 2^r on [-1/2, 1/2] less its constant term 1, of least relative error (9.1e-8; 1.6e-7 with the rounding of fp32).
P1, P2, P3, P4, P5 = f32(0.693147004), f32(0.240222424), f32(0.0555073395), f32(0.00967151113), f32(0.00132646528)
# log(1 + u) / u on [0, 1].
L0, L1, L2, L3, L4 = f32(0.99999994), f32(-0.49999493), f32(0.33319098), f32(-0.24842982), f32(0.19106007)
L5, L6, L7, L8 = f32(-0.13663246), f32(0.078225955), f32(-0.029505238), f32(0.005232694)


def larger(x, y):  # noqa: ANN001, ANN201 - compiled per type by overloads
    """The larger of two; ``x`` where either is a NaN."""
    raise TypeError("only callable from compiled code")


def raised(x, shifted):  # noqa: ANN001, ANN201 - compiled per type by overloads
    """fp32 ``x`` times two to the integer that stands in the lowest bits of ``shifted``."""
    raise TypeError("only callable from compiled code")


@overload(larger)
def _larger(x, y):  # noqa: ANN001, ANN202
    if isinstance(x, types.Float):
        # Not max, whose care for NaN would stop vectorisation.
        return lambda x, y: y if x < y else x
    return None


@intrinsic
def _raised(typing_context, x, shifted):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        bits, power = (builder.bitcast(argument, ir.IntType(32)) for argument in arguments)
        bits = builder.add(bits, builder.shl(power, ir.Constant(ir.IntType(32), 23)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32, types.float32), build


@overload(raised)
def _raise(x, shifted):  # noqa: ANN001, ANN202
    if x == types.float32:
        return lambda x, shifted: _raised(x, shifted)
    return None


@numba.njit(fastmath=FAST - {"reassoc"}, error_model="numpy")  # reordering would undo the rounding
def exp_single(x):
    x = -larger(-larger(x, EXP_LOW), -EXP_HIGH)
    shifted = x * LOG2E + ROUND
    k = shifted - ROUND
    r = x - k * LN2_HIGH - k * LN2_LOW
    p = r * f32(1.3888889e-3) + f32(8.3333333e-3)
    p = p * r + f32(4.1666667e-2)
    p = p * r + f32(1.6666667e-1)
    p = p * r + f32(0.5)
    p = p * r + f32(1.0)
    p = p * r + f32(1.0)
    return raised(p, shifted)


@numba.njit(fastmath=FAST - {"reassoc"}, error_model="numpy")  # reordering would undo the rounding
def exp2_single(x):
    """2^x for x <= 127: a polynomial in the distance to the nearest integer, which is added to the exponent's bits."""
    x = larger(x, EXP2_LOW)
    shifted = x + ROUND
    r = x - (shifted - ROUND)
    p = r * P5 + P4
    p = p * r + P3
    p = p * r + P2
    p = p * r + P1
    p = p * r + f32(1.0)
    return raised(p, shifted)


@numba.njit(fastmath=FAST, error_model="numpy")
def log1p_single(u):
    """log(1 + u) for u in [0, 1]: u times a polynomial of least relative error (3e-8; 2.1e-7 as rounded)."""
    p = u * L8 + L7
    p = p * u + L6
    p = p * u + L5
    p = p * u + L4
    p = p * u + L3
    p = p * u + L2
    p = p * u + L1
    p = p * u + L0
    return p * u


def exp(x):  # noqa: ANN001, ANN201 - compiled per dtype by the overload below
    raise TypeError("only callable from compiled code")


def exp2(x):  # noqa: ANN001, ANN201 - compiled per dtype by the overload below
    raise TypeError("only callable from compiled code")


def log1p(u):  # noqa: ANN001, ANN201 - compiled per dtype by the overload below
    raise TypeError("only callable from compiled code")


@overload(exp)
def _exp(x):  # noqa: ANN001, ANN202
    if x == types.float32:
        return lambda x: exp_single(x)
    return (lambda x: math.exp(x)) if x == types.float64 else None


@overload(exp2)
def _exp2(x):  # noqa: ANN001, ANN202
    if x == types.float32:
        return lambda x: exp2_single(x)
    return (lambda x: np.exp2(x)) if x == types.float64 else None


@overload(log1p)
def _log1p(u):  # noqa: ANN001, ANN202
    if u == types.float32:
        return lambda u: log1p_single(u)
    return (lambda u: math.log1p(u)) if u == types.float64 else None


@numba.njit(fastmath=FAST, error_model="numpy")  # a check for division by zero would stop vectorisation
def softplus(x, one):
    """log(1 + exp(x)) without overflow; ``one`` is 1 in the dtype of x, which keeps fp32 from widening."""
    return larger(x, one - one) + log1p(exp(-larger(x, -x)))


@numba.njit(fastmath=FAST, error_model="numpy")  # a check for division by zero would stop vectorisation
def sigmoid(x, one):
    return one / (one + exp(-x))
