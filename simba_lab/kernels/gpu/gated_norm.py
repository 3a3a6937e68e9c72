"""RMS norm of a gated output, as Mamba-2 has it, in one Triton kernel each way (Dao & Gu 2024, section 7.2).

Forward: a program takes one group of channels of one token. Backward: a program takes one group and a stretch of
tokens and keeps its share of the weight's gradient; the shares are added in a fixed order. Saved between the two: one
inverse rms for each token and group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.kernels.gpu.norm import HELD, as_tokens, row_layout, start_of


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    y, z, weight, out, inverse, eps: tl.constexpr, length, width, groups, y_batch, y_token, z_batch, z_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``eps`` is a constant, for an argument would reach a compiled kernel rounded to fp32."""
    ACC: tl.constexpr = inverse.dtype.element_ty
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside, channel = d < width, group * width + d
    gate = tl.load(z + start_of(row, length, z_batch, z_token) + channel, mask=inside, other=0).to(ACC)
    gated = tl.load(y + start_of(row, length, y_batch, y_token) + channel, mask=inside, other=0).to(ACC)
    gated *= gate / (1.0 + tl.exp(-gate))
    scale = tl.load(weight + channel, mask=inside, other=0).to(ACC)
    inverse_rms = tl.rsqrt(tl.sum(gated * gated, 0) / width + eps)
    tl.store(inverse + row * groups + group, inverse_rms)
    tl.store(out + row * groups * width + channel, (gated * inverse_rms * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "rows", "stretch"])
def _backward_kernel(
    y, z, weight, inverse, dout, dy, dz, partial, length, width, groups, rows, stretch,
    y_batch, y_token, z_batch, z_token, dout_batch, dout_token, BLOCK: tl.constexpr,
):  # fmt: skip
    """With u = g / rms and s = dout * weight, the gradient of g = y silu(z) is (s - u mean(s u)) / rms."""
    ACC: tl.constexpr = inverse.dtype.element_ty
    group, d = tl.program_id(1), tl.arange(0, BLOCK)
    inside, channel = d < width, group * width + d
    share = tl.zeros((BLOCK,), ACC)
    first = tl.program_id(0).to(tl.int64) * stretch
    for i in range(0, tl.minimum(stretch, rows - first)):
        row = first + i
        slope = tl.load(dout + start_of(row, length, dout_batch, dout_token) + channel, mask=inside, other=0).to(ACC)
        gate = tl.load(z + start_of(row, length, z_batch, z_token) + channel, mask=inside, other=0).to(ACC)
        value = tl.load(y + start_of(row, length, y_batch, y_token) + channel, mask=inside, other=0).to(ACC)
        inverse_rms = tl.load(inverse + row * groups + group)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        unit = value * silu * inverse_rms
        share += slope * unit
        slope *= tl.load(weight + channel, mask=inside, other=0).to(ACC)  # for each row: it would fill registers
        dgated = (slope - unit * (tl.sum(slope * unit, 0) / width)) * inverse_rms
        dgate = dgated * value * sigmoid * (1.0 + gate - silu)  # the derivative of silu
        at = row * groups * width + channel
        tl.store(dy + at, (dgated * silu).to(dy.dtype.element_ty), mask=inside)
        tl.store(dz + at, dgate.to(dz.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * groups * width + channel, share, mask=inside)


@torch.library.custom_op("simba_lab::gated_rms_norm_triton", mutates_args=())
def _norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    out, inverse = _outputs(y, groups)
    if out.numel() == 0:
        return out, inverse
    y, z = as_tokens(y), as_tokens(z)
    width = y.shape[2] // groups
    block, warps = row_layout(width)
    with torch.cuda.device_of(y):
        _forward_kernel[(inverse.numel() // groups, groups)](
            y, z, weight.contiguous(), out, inverse, eps, y.shape[1], width, groups, *y.stride()[:2], *z.stride()[:2],
            block, num_warps=warps,
        )  # fmt: skip
    return out, inverse


def _outputs(y: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Unfilled output and inverse rms (..., groups)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), y.new_empty(*y.shape[:-1], groups, dtype=wide)


@_norm.register_fake
def _(y, z, weight, eps, groups):  # noqa: ANN001, ANN202
    return _outputs(y, groups)


@torch.library.custom_op("simba_lab::gated_rms_norm_triton_backward", mutates_args=())
def _norm_backward(
    y: Tensor, z: Tensor, weight: Tensor, inverse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dz, dweight = _gradients_like(y, z, weight)
    if y.numel() == 0:
        return dy, dz, dweight.zero_()
    y, z, dout = as_tokens(y), as_tokens(z), as_tokens(dout)
    groups, channels = inverse.shape[-1], y.shape[2]
    rows, width = inverse.numel() // groups, channels // groups
    block, warps = row_layout(width)
    stretch = triton.cdiv(rows, max(1, HELD // (block * groups)))
    parts = triton.cdiv(rows, stretch)
    partial = inverse.new_empty(parts, channels)
    with torch.cuda.device_of(y):
        _backward_kernel[(parts, groups)](
            y, z, weight.contiguous(), inverse, dout, dy, dz, partial, y.shape[1], width, groups, rows, stretch,
            *y.stride()[:2], *z.stride()[:2], *dout.stride()[:2], block, num_warps=warps,
        )  # fmt: skip
    return dy, dz, partial.sum(0).to(weight.dtype)


def _gradients_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


@_norm_backward.register_fake
def _(y, z, weight, inverse, dout):  # noqa: ANN001, ANN202
    return _gradients_like(y, z, weight)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(ctx, dout, _):  # noqa: ANN001, ANN202
    return *_norm_backward(*ctx.saved_tensors, dout), None, None


_norm.register_autograd(_gradients, setup_context=_context)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """See :func:`simba_lab.kernels.reference.gated_rms_norm`; arithmetic in fp32, for fp64 input in fp64."""
    return _norm(y, z, weight, eps, groups)[0]
