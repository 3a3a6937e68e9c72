"""The causal convolution, of all tokens or of true neighbours, as an operation of Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu.conv_kernels import add_up, convolve, convolve_backward
from simba_lab.kernels.gpu.launch import last_contiguous


@dataclass(frozen=True)
class Tiling:
    """Tokens per group, most tokens per piece, and the number of programs up to which pieces are made shorter."""

    group: int
    longest: int
    programs: int


BLOCK = 512  # channels per program
FORWARD = Tiling(group=8, longest=32, programs=4096)
# What a token knows of its neighbours takes registers, hence smaller groups: eight would spill.
ADJACENT = Tiling(group=4, longest=32, programs=4096)
# Every piece of the backward leaves partial sums for weight and bias, hence longer pieces.
BACKWARD = Tiling(group=8, longest=128, programs=1024)
_WIDTHS = (2, 3, 4)


def _layout(batch: int, tokens: int, channels: int, tiling: Tiling, per_thread: int) -> tuple[int, int, int, int]:
    """Channels per program, tokens per piece, pieces of a sequence and warps: fixed by the shape alone."""
    block = min(BLOCK, triton.next_power_of_2(channels))
    span = triton.next_power_of_2(batch * tokens * triton.cdiv(channels, block) // tiling.programs)
    span = min(tiling.longest, max(tiling.group, span))
    return block, span, max(1, triton.cdiv(tokens, span)), max(1, block // (32 * per_thread))


@torch.library.custom_op("simba_lab::causal_conv_triton", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, neighbours: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Of all tokens, after ``initial``; or, with ``neighbours`` and nothing before, of true neighbours."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    out, last = x.new_empty(batch, length, channels), x.new_empty(batch, width - 1, channels)
    if last.numel() == 0:
        return out, last
    x = last_contiguous(x)
    tiling = FORWARD if neighbours is None else ADJACENT
    group = min(tiling.group, triton.next_power_of_2(max(1, length)))
    block, span, pieces, warps = _layout(batch, length, channels, tiling, per_thread=16 // x.element_size())
    with torch.cuda.device_of(x):
        convolve[(triton.cdiv(channels, block) * pieces, batch)](
            x, weight.contiguous(), bias.contiguous(), _packed(initial), _packed(neighbours), out, last, length,
            channels, span, x.stride(0), x.stride(1), width, group, block, num_warps=warps,
        )  # fmt: skip
    return out, last


def _packed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@_conv.register_fake
def _(x, weight, bias, initial, neighbours=None):  # noqa: ANN001, ANN202
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, weight.shape[1] - 1, channels)


@torch.library.custom_op("simba_lab::causal_conv_triton_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, dout: Tensor, dlast: Tensor | None,
    neighbours: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dweight, dbias, dinitial = _gradients_like(x, weight, bias, initial)
    if batch * channels == 0:
        return dx, dweight.zero_(), dbias.zero_(), dinitial
    x, dout = last_contiguous(x), last_contiguous(dout)
    # Four channels per thread: the sums and windows of eight do not fit into registers.
    block, span, pieces, warps = _layout(batch, length + width - 1, channels, BACKWARD, per_thread=4)
    partial = x.new_empty(batch * pieces, width + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.cuda.device_of(x):
        convolve_backward[(triton.cdiv(channels, block) * pieces, batch)](
            x, weight.contiguous(), bias.contiguous(), _packed(initial), _packed(neighbours), dout, _packed(dlast), dx,
            None if initial is None else dinitial, partial,
            length, channels, span, x.stride(0), x.stride(1), dout.stride(0), dout.stride(1), width,
            BACKWARD.group, block, num_warps=warps,
        )  # fmt: skip
        add_up[(triton.cdiv(channels, 64), width + 1)](
            partial, dweight, dbias, batch * pieces, channels, width, ROWS=32, BLOCK=64
        )
    return dx, dweight, dbias, dinitial


def _gradients_like(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> tuple[Tensor, ...]:
    """Unfilled gradients, contiguous; that of a missing ``initial`` is empty."""
    dinitial = x.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dinitial


@_conv_backward.register_fake
def _(x, weight, bias, initial, dout, dlast, neighbours=None):  # noqa: ANN001, ANN202
    return _gradients_like(x, weight, bias, initial)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlast):  # noqa: ANN001, ANN202
    x, weight, bias, initial, neighbours = ctx.saved_tensors
    dout = x.new_zeros(x.shape) if dout is None else dout
    dx, dweight, dbias, dinitial = _conv_backward(x, weight, bias, initial, dout, dlast, neighbours)
    return dx, dweight, dbias, None if initial is None else dinitial, None


_conv.register_autograd(_gradients, setup_context=_context)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.causal_conv`: ``x`` (B, L, D), ``weight`` (D, W), W from 2 to 4.

    Raises InputError for other widths.
    """
    _check_width(weight)
    return _conv(x, weight, bias, initial)


def neighbour_conv(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.neighbour_conv`: ``neighbours`` of any integer dtype, W from 2 to 4.

    Raises InputError for other widths.
    """
    _check_width(weight)
    return _conv(x, weight, bias, None, neighbours)


def _check_width(weight: Tensor) -> None:
    if weight.shape[1] not in _WIDTHS:
        raise InputError(f"d_conv: the triton backend takes 2, 3 or 4, not {weight.shape[1]}; use another backend")
