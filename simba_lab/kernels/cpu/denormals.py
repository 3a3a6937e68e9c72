"""Denormal numbers count as 0 while a kernel runs, as they do on GPUs.

Products of many decays run through fp32's smallest numbers before they reach 0, and Intel's processors spend more than
a hundred cycles on each operation with such a number. Only x86-64 is told; others go on as they are.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLUSH = 0x8040
"""Of the control register MXCSR: results that are denormal become 0 (bit 15), and so do operands (bit 6)."""
_CAN_BE_TOLD = platform.machine().lower() in ("x86_64", "amd64")


def _access(builder: Any, name: str, slot: Any) -> None:
    """One of LLVM's two ways of moving MXCSR from and to memory."""
    byte = builder.bitcast(slot, ir.IntType(8).as_pointer())
    function = builder.module.declare_intrinsic(f"llvm.x86.sse.{name}", (), ir.FunctionType(ir.VoidType(), [byte.type]))
    builder.call(function, [byte])


@intrinsic
def flush_denormals(typing_context):  # noqa: ANN001, ANN201 - numba's own calling convention
    """Begins it for this thread; returns what :func:`restore_denormals` needs to end it."""

    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        word = ir.IntType(32)
        if not _CAN_BE_TOLD:
            return word(0)
        slot = builder.alloca(word)
        _access(builder, "stmxcsr", slot)
        before = builder.load(slot)
        builder.store(builder.or_(before, word(_FLUSH)), slot)
        _access(builder, "ldmxcsr", slot)
        return before

    return types.uint32(), build


@intrinsic
def restore_denormals(typing_context, before):  # noqa: ANN001, ANN201 - numba's own calling convention
    def build(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        if _CAN_BE_TOLD:
            slot = builder.alloca(ir.IntType(32))
            builder.store(arguments[0], slot)
            _access(builder, "ldmxcsr", slot)
        return context.get_dummy_value()

    return types.none(types.uint32), build
