"""Short vectors as values inside the CPU kernels: ``LANES`` neighbouring channels that stay in registers.

LLVM makes vector instructions of a loop only if it can show that the arrays it writes overlap no other, which it gives
up on beyond a few arrays. Here a kernel says itself what is loaded, computed and stored. A vector is LLVM's own type,
so that every processor gets as many registers as it needs for one: AVX-512 one, AVX2 two, in fp32.

``load(array, at)`` and ``store(array, at, vector)`` take contiguous arrays of one dimension and check no bounds.
``+ - * /`` take vectors and, on one side, a scalar of the same dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from simba_lab.kernels.cpu import elementary

LANES = 16
_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


class Vector(types.Type):
    """``LANES`` numbers of one dtype."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(f"Vector({element})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(_ELEMENTS[kind.element], LANES))


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Address of entry ``at`` of an array, as one of a vector that need not be aligned."""
    kind, element = signature.args[0], _ELEMENTS[signature.args[0].dtype]
    data = context.make_array(kind)(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), ir.VectorType(element, LANES).as_pointer())


@numba.njit
def lanes(count, dtype):
    """Zeros for ``count`` vectors, flat, that start with a cache line."""
    memory = np.zeros(count * LANES + 64, dtype)
    skip = (-memory.ctypes.data % 64) // memory.itemsize
    return memory[skip : skip + count * LANES]


@intrinsic
def load(typing_context, array, at):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.load(_pointer(context, builder, signature, arguments), align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), build


@intrinsic
def store(typing_context, array, at, vector):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        pointer = _pointer(context, builder, signature, arguments)
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), build


@intrinsic
def entry(typing_context, array, at):  # noqa: ANN001, ANN202 - numba's own calling convention
    """One number of a contiguous array; ``array[at]`` would first see whether ``at`` counts from the end."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        data = context.make_array(array)(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), build


@intrinsic
def prefetch(typing_context, array, at):  # noqa: ANN001, ANN202 - numba's own calling convention
    """Fetch the cache line of entry ``at`` of an array, which may lie outside of it, into the second-level cache."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        flag = ir.IntType(32)
        pointer = builder.gep(context.make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
        byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, flag, flag, flag])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte.type], kind)
        builder.call(fetch, [byte, flag(0), flag(2), flag(1)])  # for reading, into the second level, data
        return context.get_dummy_value()

    return types.none(array, types.intp), build


def _spread(builder: Any, kind: Any, value: Any) -> Any:
    """The value itself if it is a vector, else one with the scalar in every lane."""
    if isinstance(kind, Vector):
        return value
    whole = ir.VectorType(value.type, LANES)
    one = builder.insert_element(ir.Constant(whole, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def splat(typing_context, value):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return _spread(builder, value, arguments[0])

    return Vector(value)(value), build


def _vector_of(left: types.Type, right: types.Type) -> Vector | None:
    """Type of an operation on two vectors or a vector and a scalar of its dtype; None for anything else."""
    found = left if isinstance(left, Vector) else right
    others = (found, found.element) if isinstance(found, Vector) else ()
    return found if left in others and right in others else None


def _operator(symbol: Callable[..., Any], in_place: Callable[..., Any], name: str) -> None:
    @intrinsic
    def apply(typing_context, left, right):  # noqa: ANN001, ANN202 - numba's own calling convention
        def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
            pair = (_spread(builder, *each) for each in zip(signature.args, arguments, strict=True))
            return getattr(builder, name)(*pair)

        return _vector_of(left, right)(left, right), build

    @overload(symbol)
    @overload(in_place)
    def _(left, right):  # noqa: ANN001, ANN202
        if _vector_of(left, right) is not None:
            return lambda left, right: apply(left, right)
        return None


_operator(operator.add, operator.iadd, "fadd")
_operator(operator.sub, operator.isub, "fsub")
_operator(operator.mul, operator.imul, "fmul")
_operator(operator.truediv, operator.itruediv, "fdiv")


def _reduced(name: str, flag: str, builder: Any, value: Any, *start: Any) -> Any:
    """The lanes of a vector combined into a number by one of LLVM's reductions."""
    element = value.type.element
    bits = 64 if isinstance(element, ir.DoubleType) else 32
    kind = ir.FunctionType(element, [each.type for each in (*start, value)])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}f{bits}")
    return builder.call(function, [*start, value], fastmath=(flag,))


@intrinsic
def total(typing_context, vector):  # noqa: ANN001, ANN202 - numba's own calling convention
    """Sum over the lanes."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        zero = ir.Constant(arguments[0].type.element, 0.0)
        return _reduced("fadd", "reassoc", builder, arguments[0], zero)

    return vector.element(vector), build


@intrinsic
def maximum(typing_context, vector):  # noqa: ANN001, ANN202 - numba's own calling convention
    """Largest of the lanes, none of which may be a NaN: to look for one takes three times as long."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return _reduced("fmax", "nnan", builder, arguments[0])

    return vector.element(vector), build


@intrinsic
def _negative(typing_context, vector):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.fneg(arguments[0])

    return vector(vector), build


@overload(operator.neg)
def _(vector):  # noqa: ANN001, ANN202
    return (lambda vector: _negative(vector)) if isinstance(vector, Vector) else None


@intrinsic
def _larger(typing_context, vector, other):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        first, second = (_spread(builder, *each) for each in zip(signature.args, arguments, strict=True))
        return builder.select(builder.fcmp_ordered("<", first, second), second, first)

    return vector(vector, other), build


@intrinsic
def highest(typing_context, best, value):  # noqa: ANN001, ANN202 - numba's own calling convention
    """The larger of two, lane by lane; a NaN where either is one."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        first, second = arguments
        stays = builder.or_(builder.fcmp_ordered(">", first, second), builder.fcmp_unordered("!=", first, first))
        return builder.select(stays, first, second)

    return best(best, value), build


@intrinsic
def all_at_most(typing_context, vector, bound):  # noqa: ANN001, ANN202 - numba's own calling convention
    """Whether no lane is above a number, nor a NaN."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        limit = _spread(builder, vector.element, context.cast(builder, arguments[1], bound, vector.element))
        below = builder.fcmp_ordered("<=", arguments[0], limit)
        return builder.icmp_unsigned("==", builder.bitcast(below, ir.IntType(LANES)), ir.IntType(LANES)(2**LANES - 1))

    return types.boolean(vector, bound), build


@overload(elementary.larger)
def _(x, y):  # noqa: ANN001, ANN202
    return (lambda x, y: _larger(x, y)) if isinstance(x, Vector) else None


@intrinsic
def _raised(typing_context, vector, shifted):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        whole = ir.VectorType(ir.IntType(32), LANES)
        value, power = (builder.bitcast(argument, whole) for argument in arguments)
        value = builder.add(value, builder.shl(power, ir.Constant(whole, [23] * LANES)))
        return builder.bitcast(value, ir.VectorType(ir.FloatType(), LANES))

    return vector(vector, shifted), build


@overload(elementary.raised)
def _(x, shifted):  # noqa: ANN001, ANN202
    return (lambda x, shifted: _raised(x, shifted)) if isinstance(x, Vector) else None


@intrinsic
def _lane(typing_context, vector, at):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.extract_element(*arguments)

    return vector.element(vector, types.intp), build


@intrinsic
def _with_lane(typing_context, vector, value, at):  # noqa: ANN001, ANN202 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.insert_element(*arguments)

    return vector(vector, value, types.intp), build


def _elementwise(function: Callable[..., Any], single: Callable[..., Any]) -> None:
    """A function of one vector: in fp32 by polynomials, in fp64 lane by lane as of a number."""

    @numba.njit
    def double(x):  # noqa: ANN001, ANN202
        for i in range(LANES):
            x = _with_lane(x, function(_lane(x, i)), i)
        return x

    @overload(function)
    def _(x):  # noqa: ANN001, ANN202
        if x == Vector(types.float32):
            return lambda x: single(x)
        return (lambda x: double(x)) if x == Vector(types.float64) else None


_elementwise(elementary.exp, elementary.exp_single)
_elementwise(elementary.exp2, elementary.exp2_single)
_elementwise(elementary.log1p, elementary.log1p_single)
