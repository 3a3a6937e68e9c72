"""The scan of Mamba-2 as an operation: Triton kernels behind ``torch.library``, with gradients and shape inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu import launch
from simba_lab.kernels.gpu.ssd_backward import head_gradients, vector_gradients
from simba_lab.kernels.gpu.ssd_kernels import scan_chunks, step_sums, walk_states

SEGMENT_TOKENS = 2048
"""A shorter stretch of a sequence is not worth the second reading of x that a program of its own costs."""
PROGRAMS = 264
"""Programs that a long sequence is cut into, two to a multiprocessor; never for the batch, so that no sum depends on
who else is in it."""
HEADS_TOGETHER = 16
"""Heads of a group whose gradients of B and C one program adds up."""
MAX_STATES, MAX_WIDTH = 256, 128


@dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of a program: fixed rules of shapes and dtype, so that runs repeat exactly."""

    chunk: int
    width: int
    states: int
    whole_width: int
    states_together: int
    stages: int
    precision: str

    @classmethod
    def of(cls, x: Tensor, states: int) -> Tiling:
        """``x`` (B, L, H, P). fp32 is multiplied as three products of TF32 numbers, which keep 22 bits.

        A chunk is as long as registers allow: operands of such a product are held in them, three times over.
        """
        single = x.dtype == torch.float32
        states, width = (max(16, triton.next_power_of_2(size)) for size in (states, x.shape[3]))
        chunk = 16 if single else 32 if states > 128 or width > 64 else 64
        together, stages, precision = (32, 1, "tf32x3") if single else (64, 2, "tf32")
        return cls(chunk, min(width, 64), states, width, together, stages, precision)


@dataclass(frozen=True)
class StepSums:
    """Steps and running sums of ``delta A``: see :func:`simba_lab.kernels.gpu.ssd_kernels.step_sums`."""

    delta: Tensor  # (B, H, padded) fp32, as the others
    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, dt: Tensor, dt_bias: Tensor, A: Tensor, chunk: int) -> StepSums:
        batch, length, heads = dt.shape
        chunks, together = triton.cdiv(length, chunk), 16
        sums = cls(*dt.new_empty(3, batch, heads, chunks * chunk, dtype=torch.float32).unbind())
        step_sums[(chunks, triton.cdiv(heads, together), batch)](
            dt, dt_bias.contiguous(), A.contiguous(), *sums.operands(), length, heads, chunks * chunk, *dt.stride(),
            CHUNK=chunk, HEADS=together, FAST=launch.on_gpu(dt), num_warps=4,
        )  # fmt: skip
        return sums

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.delta, self.high, self.low


def segments(length: int, heads: int) -> int:
    """Stretches of a sequence that are scanned side by side, each from a state found beforehand."""
    return max(1, min(PROGRAMS // heads, length // SEGMENT_TOKENS))


def _walk(
    values: Tensor, vectors: Tensor, sums: StepSums, first: Tensor | None, last: Tensor | None, tiling: Tiling,
    chunks: int, every: int, dtype: torch.dtype, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """The states before every ``every``-th of ``chunks`` chunks (B H, slots, N, P), or gradients of those behind."""
    (batch, length, heads, width), (groups, n) = values.shape, vectors.shape[2:]
    slots = values.new_empty(batch * heads, triton.cdiv(chunks, every), n, width, dtype=dtype)
    states = min(32, tiling.states)
    walk_states[(batch * heads, triton.cdiv(n, states), triton.cdiv(width, tiling.width))](
        values, vectors, *sums.operands(), first, slots, last, heads, groups, length, sums.delta.shape[2], chunks,
        every, *values.stride()[:3], *vectors.stride()[:3],
        P=width, N=n, CHUNK=tiling.chunk, WIDTH=tiling.width, STATES=states, REVERSE=reverse,
        PRECISION=tiling.precision, FAST=launch.on_gpu(values), STAGES=tiling.stages + 1, num_warps=4,
    )  # fmt: skip
    return slots


def _empty_outputs(x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Unfilled output (B, L, H, P) and final state (B, H, P, N)."""
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, B.shape[3], dtype=torch.float32)


@torch.library.custom_op("simba_lab::ssd_triton", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, length, heads, width), (groups, n) = x.shape, B.shape[2:]
    tiling = Tiling.of(x, n)
    chunks, parts = triton.cdiv(length, tiling.chunk), segments(length, heads)
    every = triton.cdiv(chunks, parts)
    parts = triton.cdiv(chunks, every)
    initial = None if initial is None else initial.contiguous()
    out, final = _empty_outputs(x, B)
    with torch.cuda.device_of(x):
        sums, slots = StepSums.of(dt, dt_bias, A, tiling.chunk), None
        if parts > 1:  # up to the start of the last segment
            slots = _walk(x, B, sums, initial, None, tiling, (parts - 1) * every + 1, every, torch.float32)
        scan_chunks[(batch * heads, parts, triton.cdiv(width, tiling.width))](
            x, *sums.operands(), B, C, D.contiguous(), initial, slots, out, final,
            heads, groups, length, sums.delta.shape[2], every * tiling.chunk, parts,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
            P=width, N=n, CHUNK=tiling.chunk, WIDTH=tiling.width, STATES=tiling.states,
            PRECISION=tiling.precision, FAST=launch.on_gpu(x), STAGES=tiling.stages,
            num_warps=8 if tiling.states > 128 or x.dtype == torch.float32 else 4,
        )  # fmt: skip
    return out, final


@_ssd.register_fake
def _(x, dt, dt_bias, A, B, C, D, initial):  # noqa: ANN001, ANN202
    return _empty_outputs(x, B)


@torch.library.custom_op("simba_lab::ssd_triton_backward", mutates_args=())
def _ssd_backward(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None,
    dout: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, dt_bias, A, B, C, D and initial. The states are computed again: keeping them costs more."""
    (batch, length, heads, width), (groups, n) = x.shape, B.shape[2:]
    tiling = Tiling.of(x, n)
    chunks, share = triton.cdiv(length, tiling.chunk), min(HEADS_TOGETHER, heads // groups)
    parts = triton.cdiv(heads // groups, share)
    initial, dfinal = (None if t is None else t.contiguous() for t in (initial, dfinal))
    dout = dout.contiguous()
    dx, dinitial = _empty_outputs(x, B)
    dB, dC = dinitial.new_empty(2, batch, parts, length, groups, n).unbind()
    dD = dinitial.new_empty(batch, heads, chunks)
    fixed = {
        "P": width, "N": n, "CHUNK": tiling.chunk, "WIDTH": tiling.whole_width, "PRECISION": tiling.precision,
        "FAST": launch.on_gpu(x), "num_warps": 8,
    }  # fmt: skip
    strides = *x.stride()[:3], *B.stride()[:3], *C.stride()[:3]
    with torch.cuda.device_of(x):
        sums = StepSums.of(dt, dt_bias, A, tiling.chunk)
        states = _walk(x, B, sums, initial, None, tiling, chunks, 1, x.dtype)
        dstates = _walk(dout, C, sums, dfinal, dinitial, tiling, chunks, 1, x.dtype, reverse=True)
        direct, dlogs = torch.empty_like(sums.delta), torch.empty_like(sums.delta)
        sizes = heads, groups, length, sums.delta.shape[2], chunks
        head_gradients[(batch * heads * chunks,)](
            x, dout, *sums.operands(), B, C, D.contiguous(), states, dstates, dx, direct, dlogs, dD, *sizes, *strides,
            STATES=min(tiling.states, tiling.states_together), **fixed,
        )  # fmt: skip
        together = min(tiling.states, 2 * tiling.states_together)
        vector_gradients[(batch * chunks, groups * parts, triton.cdiv(n, together))](
            x, dout, *sums.operands(), B, C, states, dstates, dB, dC, *sizes, share, *strides,
            STATES=together, STAGES=tiling.stages, **fixed,
        )  # fmt: skip
    # The derivative of softplus is 1 - exp(-delta); steps of tokens that do not exist are 0, and so is their share.
    ddt = (direct + dlogs * A.float()[:, None]) * -torch.expm1(-sums.delta)
    dA, dbias = (dlogs * sums.delta).sum((0, 2)), ddt.sum((0, 2))
    ddt = ddt[..., :length].transpose(1, 2).to(dt.dtype).contiguous()
    by_token = (t.sum(1).to(B.dtype) for t in (dB, dC))
    return dx, ddt, dbias, dA, *by_token, dD.sum((0, 2)), dinitial


@_ssd_backward.register_fake
def _(x, dt, dt_bias, A, B, C, D, initial, dout, dfinal):  # noqa: ANN001, ANN202
    dx, dinitial = _empty_outputs(x, B)
    dbias, dA, dD = (dinitial.new_empty(x.shape[2]) for _ in range(3))
    return dx, dt.new_empty(dt.shape), dbias, dA, B.new_empty(B.shape), C.new_empty(C.shape), dD, dinitial


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dfinal):  # noqa: ANN001, ANN202
    inputs = ctx.saved_tensors
    dout = torch.zeros_like(inputs[0], memory_format=torch.contiguous_format) if dout is None else dout
    gradients = _ssd_backward(*inputs, dout, dfinal)
    return tuple(None if t is None else g.to(t.dtype) for t, g in zip(inputs, gradients, strict=True))


_ssd.register_autograd(_gradients, setup_context=_context)


def _check(x: Tensor, states: int) -> None:
    if x.dtype == torch.float64:
        raise InputError("backend: triton scans in fp32; use backend reference for fp64")
    if states > MAX_STATES:
        raise InputError(f"d_state: the triton backend takes at most {MAX_STATES}, not {states}; use backend reference")
    if x.shape[3] > MAX_WIDTH:
        raise InputError(f"headdim: the triton backend takes at most {MAX_WIDTH}, not {x.shape[3]}; use reference")


def ssd(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd`; products take fp16 and bf16 numbers as they are and add in fp32.

    ``chunk_size`` is not used: chunks are as large as the registers hold. Raises InputError for fp64, more than 256
    states or more than 128 channels per head.
    """
    _check(x, B.shape[3])
    if x.numel() == 0:
        empty = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
        return torch.empty_like(x), empty if initial is None else initial.float()
    dtype = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    vectors = [launch.last_contiguous(t.to(dtype)) for t in (x, B, C)]
    out, final = _ssd(vectors[0], dt, dt_bias, A, *vectors[1:], D, initial)
    return out.to(x.dtype), final
