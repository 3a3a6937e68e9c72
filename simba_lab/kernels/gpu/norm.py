"""Residual addition and RMS norm in one Triton kernel, forward and backward (Zhang & Sennrich 2019, equation 4).

Forward: a program takes one row (token), which it holds whole: rows of up to 8192 channels fit into registers.
Backward: a program takes a stretch of rows and keeps its share of the weight's gradient; the shares are added in a
fixed order. Saved between the two: the new residual stream and one inverse rms per row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a row per thread: two 16-byte accesses of a 16-bit dtype, four of fp32.
PER_THREAD, MAX_WARPS = 16, 16
# Elements that all programs of the backward hold at once; it sets the number of partial sums of the weight's gradient.
HELD = 2**20


@triton.jit
def start_of(row, length, batch_stride, token_stride):
    """Offset of a row in a tensor (B, L, D) of any strides over batch and length."""
    return row // length * batch_stride + row % length * token_stride


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    hidden, residual, weight, normed, stream, inverse, eps, length, channels,
    hidden_batch, hidden_token, residual_batch, residual_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stream.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < channels
    total = tl.load(hidden + start_of(row, length, hidden_batch, hidden_token) + d, mask=inside, other=0).to(ACC)
    if residual is not None:
        before = residual + start_of(row, length, residual_batch, residual_token)
        total += tl.load(before + d, mask=inside, other=0).to(ACC)
    scale = tl.load(weight + d, mask=inside, other=0).to(ACC)
    tl.store(stream + row * channels + d, total, mask=inside)
    inverse_rms = tl.rsqrt(tl.sum(total * total, 0) / channels + eps)
    tl.store(inverse + row, inverse_rms)
    scaled = total * inverse_rms * scale
    tl.store(normed + row * channels + d, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "rows", "stretch"])
def _backward_kernel(
    stream, inverse, weight, dnormed, dstream, dhidden, dresidual, partial, length, channels, rows, stretch,
    dnormed_batch, dnormed_token, dstream_batch, dstream_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With u = stream / rms and g = dnormed * weight: the input's gradient is (g - u mean(g u)) / rms + dstream."""
    ACC: tl.constexpr = stream.dtype.element_ty
    d = tl.arange(0, BLOCK)
    inside = d < channels
    scale = tl.load(weight + d, mask=inside, other=0).to(ACC)
    share = tl.zeros((BLOCK,), ACC)
    first = tl.program_id(0).to(tl.int64) * stretch
    for i in range(0, tl.minimum(stretch, rows - first)):
        row = first + i
        given = dnormed + start_of(row, length, dnormed_batch, dnormed_token)
        slope = tl.load(given + d, mask=inside, other=0).to(ACC)
        unit = tl.load(stream + row * channels + d, mask=inside, other=0)
        inverse_rms = tl.load(inverse + row)
        unit *= inverse_rms
        share += slope * unit
        slope *= scale
        dinput = (slope - unit * (tl.sum(slope * unit, 0) / channels)) * inverse_rms
        if dstream is not None:
            later = dstream + start_of(row, length, dstream_batch, dstream_token)
            dinput += tl.load(later + d, mask=inside, other=0).to(ACC)
        tl.store(dhidden + row * channels + d, dinput.to(dhidden.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + row * channels + d, dinput, mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * channels + d, share, mask=inside)


def row_layout(channels: int) -> tuple[int, int]:
    """Row length in a program and warps."""
    block = triton.next_power_of_2(channels)
    return block, min(MAX_WARPS, max(1, block // (32 * PER_THREAD)))


def as_tokens(t: Tensor) -> Tensor:
    """``t`` (..., D) as (B, L, D) with contiguous channels; a copy only where strides demand it."""
    t = t if t.ndim == 3 else t.reshape(1, -1, t.shape[-1])
    return t if t.stride(2) == 1 else t.contiguous()


@torch.library.custom_op("simba_lab::add_rms_norm_triton", mutates_args=())
def _norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normed, stream, inverse = _outputs(hidden, dtype)
    if stream.numel() == 0:
        return normed, stream, inverse
    hidden, residual = as_tokens(hidden), None if residual is None else as_tokens(residual)
    strides = (0, 0) if residual is None else residual.stride()[:2]
    block, warps = row_layout(hidden.shape[2])
    with torch.cuda.device_of(hidden):
        _forward_kernel[(inverse.numel(),)](
            hidden, residual, weight.contiguous(), normed, stream, inverse, eps, *hidden.shape[1:],
            *hidden.stride()[:2], *strides, block, num_warps=warps,
        )  # fmt: skip
    return normed, stream, inverse


def _outputs(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled ``normed``, new residual stream and inverse rms per row."""
    wide, shape = torch.promote_types(hidden.dtype, torch.float32), hidden.shape
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape, dtype=wide),
        hidden.new_empty(shape[:-1], dtype=wide),
    )


@_norm.register_fake
def _(hidden, residual, weight, eps, dtype):  # noqa: ANN001, ANN202
    return _outputs(hidden, dtype)


@torch.library.custom_op("simba_lab::add_rms_norm_triton_backward", mutates_args=())
def _norm_backward(
    stream: Tensor, inverse: Tensor, weight: Tensor, dnormed: Tensor, dstream: Tensor | None, dtype: torch.dtype,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden in ``dtype``, of the residual (in the stream's dtype; empty if not wanted) and of weight."""
    dhidden, dresidual, dweight = _gradients_like(stream, weight, dtype, with_residual)
    if stream.numel() == 0:
        return dhidden, dresidual, dweight.zero_()
    dnormed, dstream = as_tokens(dnormed), None if dstream is None else as_tokens(dstream)
    strides = (0, 0) if dstream is None else dstream.stride()[:2]
    rows, channels = inverse.numel(), stream.shape[-1]
    block, warps = row_layout(channels)
    stretch = triton.cdiv(rows, max(1, HELD // block))
    parts = triton.cdiv(rows, stretch)
    partial = stream.new_empty(parts, channels)
    with torch.cuda.device_of(stream):
        _backward_kernel[(parts,)](
            stream, inverse, weight.contiguous(), dnormed, dstream, dhidden, dresidual if with_residual else None,
            partial, dnormed.shape[1], channels, rows, stretch, *dnormed.stride()[:2], *strides,
            block, num_warps=warps,
        )  # fmt: skip
    return dhidden, dresidual, partial.sum(0).to(weight.dtype)


def _gradients_like(
    stream: Tensor, weight: Tensor, dtype: torch.dtype, with_residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = stream.new_empty(stream.shape if with_residual else 0)
    return stream.new_empty(stream.shape, dtype=dtype), dresidual, weight.new_empty(weight.shape)


@_norm_backward.register_fake
def _(stream, inverse, weight, dnormed, dstream, dtype, with_residual):  # noqa: ANN001, ANN202
    return _gradients_like(stream, weight, dtype, with_residual)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, residual, weight, *_ = inputs
    _, stream, inverse = output
    ctx.save_for_backward(stream, inverse, weight)
    ctx.dtype, ctx.has_residual = hidden.dtype, residual is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx, dnormed, dstream, _):  # noqa: ANN001, ANN202
    stream, inverse, weight = ctx.saved_tensors
    if dnormed is None:
        return dstream.to(ctx.dtype), dstream if ctx.has_residual else None, None, None, None
    separate = ctx.has_residual and ctx.dtype != stream.dtype
    dhidden, dresidual, dweight = _norm_backward(stream, inverse, weight, dnormed, dstream, ctx.dtype, separate)
    return dhidden, (dresidual if separate else dhidden) if ctx.has_residual else None, dweight, None, None


_norm.register_autograd(_gradients, setup_context=_context)


def _normed_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.is_meta or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.add_rms_norm`: (normed, residual stream), both (B, L, D).

    ``normed`` has the dtype of ``weight``, under autocast the dtype of autocast: the matrix product that reads it
    would round it to that anyway. The stream stays fp32 (fp64 for fp64 input) either way.
    """
    normed, stream, _ = _norm(hidden, residual, weight, eps, _normed_dtype(hidden, weight))
    return normed, stream
