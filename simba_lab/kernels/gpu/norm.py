"""Residual addition and RMS norm in one Triton kernel, forward and backward (Zhang & Sennrich 2019, equation 4).

Forward: a program takes one row (token), which it holds whole: rows of up to 8192 channels fit into registers.
Backward: a program takes a stretch of rows and keeps its share of the weight's gradient; the shares are added in a
fixed order. Saved between the two: the new residual stream and one inverse rms per row.

After tokens were chosen, rows are read where the chosen ones lie and gradients written there, over zeros: the shorter
streams exist nowhere but in registers.
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


@triton.jit
def _source(row, length, chosen, kept, present):
    """Sequence and token that row ``row`` of (B, ``length``, D) comes from: itself unless tokens were ``chosen``."""
    batch, token = row // length, row % length
    if chosen is not None:
        named = tl.load(chosen + batch * kept + token, mask=token < kept, other=0)
        token = tl.where(token < kept, named, token - kept + present)
    return batch, token


@triton.jit(do_not_specialize=["length", "kept", "present"])
def _forward_kernel(
    hidden, residual, weight, chosen, normed, stream, inverse, eps: tl.constexpr, length, kept, present, channels,
    hidden_batch, hidden_token, residual_batch, residual_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``length`` tokens a sequence; with ``chosen`` (B, kept), those and then all after the first ``present``.

    ``eps`` is a constant, for an argument would reach a compiled kernel rounded to fp32.
    """
    ACC: tl.constexpr = stream.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < channels
    batch, token = _source(row, length, chosen, kept, present)
    total = tl.load(hidden + batch * hidden_batch + token * hidden_token + d, mask=inside, other=0).to(ACC)
    if residual is not None:
        before = residual + batch * residual_batch + token * residual_token
        total += tl.load(before + d, mask=inside, other=0).to(ACC)
    scale = tl.load(weight + d, mask=inside, other=0).to(ACC)
    tl.store(stream + row * channels + d, total, mask=inside)
    inverse_rms = tl.rsqrt(tl.sum(total * total, 0) / channels + eps)
    tl.store(inverse + row, inverse_rms)
    scaled = total * inverse_rms * scale
    tl.store(normed + row * channels + d, scaled.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "kept", "present", "longer", "rows", "stretch"])
def _backward_kernel(
    stream, inverse, weight, chosen, dnormed, dstream, dhidden, dresidual, partial,
    length, kept, present, longer, channels, rows, stretch,
    dnormed_batch, dnormed_token, dstream_batch, dstream_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With u = stream / rms and g = dnormed * weight: the input's gradient is (g - u mean(g u)) / rms + dstream.

    It goes where the row came from, in sequences of ``longer`` tokens.
    """
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
        batch, token = _source(row, length, chosen, kept, present)
        target = (batch * longer + token) * channels + d
        tl.store(dhidden + target, dinput.to(dhidden.dtype.element_ty), mask=inside)
        if dresidual is not None:
            tl.store(dresidual + target, dinput, mask=inside)
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
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype,
    chosen: Tensor | None = None, present: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of all tokens (..., D); or of ``chosen`` (B, k) of the first ``present`` and all after them, of (B, L, D)."""
    normed, stream, inverse = _outputs(hidden, dtype, chosen, present)
    if stream.numel() == 0:
        return normed, stream, inverse
    hidden, residual = as_tokens(hidden), None if residual is None else as_tokens(residual)
    strides = (0, 0) if residual is None else residual.stride()[:2]
    block, warps = row_layout(hidden.shape[2])
    with torch.cuda.device_of(hidden):
        _forward_kernel[(inverse.numel(),)](
            hidden, residual, weight.contiguous(), _packed(chosen), normed, stream, inverse, eps,
            *_lengths(hidden.shape[1], chosen, present), hidden.shape[2], *hidden.stride()[:2], *strides,
            block, num_warps=warps,
        )  # fmt: skip
    return normed, stream, inverse


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _lengths(longer: int, chosen: Tensor | None, present: int) -> tuple[int, int, int]:
    """Tokens that are left of ``longer``, chosen ones among them, and tokens they were chosen from."""
    return (longer, 0, 0) if chosen is None else (chosen.shape[1] + longer - present, chosen.shape[1], present)


def _outputs(hidden: Tensor, dtype: torch.dtype, chosen: Tensor | None, present: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled ``normed``, new residual stream and inverse rms per row."""
    wide, shape = torch.promote_types(hidden.dtype, torch.float32), list(hidden.shape)
    if chosen is not None:
        shape[1] = _lengths(shape[1], chosen, present)[0]
    return (
        hidden.new_empty(shape, dtype=dtype),
        hidden.new_empty(shape, dtype=wide),
        hidden.new_empty(shape[:-1], dtype=wide),
    )


@_norm.register_fake
def _(hidden, residual, weight, eps, dtype, chosen=None, present=0):  # noqa: ANN001, ANN202
    return _outputs(hidden, dtype, chosen, present)


@torch.library.custom_op("simba_lab::add_rms_norm_triton_backward", mutates_args=())
def _norm_backward(
    stream: Tensor, inverse: Tensor, weight: Tensor, dnormed: Tensor, dstream: Tensor | None, dtype: torch.dtype,
    with_residual: bool, chosen: Tensor | None = None, present: int = 0, longer: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden in ``dtype``, of the residual (in the stream's dtype; empty if not wanted) and of weight.

    With ``chosen`` those of hidden and residual have ``longer`` tokens, zeros where none was chosen.
    """
    dhidden, dresidual, dweight = _gradients_like(stream, weight, dtype, with_residual, chosen, longer)
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
            stream, inverse, weight.contiguous(), _packed(chosen), dnormed, dstream, dhidden,
            dresidual if with_residual else None, partial, dnormed.shape[1],
            0 if chosen is None else chosen.shape[1], present, dnormed.shape[1] if chosen is None else longer,
            channels, rows, stretch, *dnormed.stride()[:2], *strides, block, num_warps=warps,
        )  # fmt: skip
    return dhidden, dresidual, partial.sum(0).to(weight.dtype)


def _gradients_like(
    stream: Tensor, weight: Tensor, dtype: torch.dtype, with_residual: bool, chosen: Tensor | None, longer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to be filled; of tokens of which only some were chosen, zeros."""
    shape, fresh = list(stream.shape), stream.new_empty
    if chosen is not None:
        shape[1], fresh = longer, stream.new_zeros
    return fresh(shape, dtype=dtype), fresh(shape if with_residual else 0), weight.new_empty(weight.shape)


@_norm_backward.register_fake
def _(stream, inverse, weight, dnormed, dstream, dtype, with_residual, chosen=None, present=0, longer=0):  # noqa: ANN001, ANN202
    return _gradients_like(stream, weight, dtype, with_residual, chosen, longer)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, residual, weight, _, _, chosen, ctx.present = inputs
    _, stream, inverse = output
    ctx.save_for_backward(stream, inverse, weight, chosen)
    ctx.dtype, ctx.has_residual = hidden.dtype, residual is not None
    ctx.longer = 0 if chosen is None else hidden.shape[1]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dnormed, dstream, _):  # noqa: ANN001, ANN202
    stream, inverse, weight, chosen = ctx.saved_tensors
    others = (None,) * 4
    if dnormed is None and chosen is None:
        return dstream.to(ctx.dtype), dstream if ctx.has_residual else None, None, *others
    dnormed = torch.zeros_like(stream) if dnormed is None else dnormed
    separate = ctx.has_residual and ctx.dtype != stream.dtype
    dhidden, dresidual, dweight = _norm_backward(
        stream, inverse, weight, dnormed, dstream, ctx.dtype, separate, chosen, ctx.present, ctx.longer
    )
    return dhidden, (dresidual if separate else dhidden) if ctx.has_residual else None, dweight, *others


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


def keep_add_rms_norm(
    hidden: Tensor, residual: Tensor, chosen: Tensor, present: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_add_rms_norm`; dtypes as in :func:`add_rms_norm`."""
    normed, stream, _ = _norm(hidden, residual, weight, eps, _normed_dtype(hidden, weight), chosen, present)
    return normed, stream
