"""Hidden and residual stream without the dropped tokens, in one Triton kernel that also runs backwards.

A program moves one token of the shorter streams: kept tokens lie where ``chosen`` says, those after the first
``present`` follow them. Nothing is computed, so gradients are exact; a token is never named twice, so that they need no
atomics: they are stored over zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.kernels.gpu.launch import last_contiguous

# Elements of a row per thread: two 16-byte accesses of a 16-bit dtype, four of fp32.
PER_THREAD, MAX_WARPS = 16, 16


@triton.jit
def _move(source, target, d, inside):
    tl.store(target + d, tl.load(source + d, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["kept", "present", "shorter"])
def _tokens_kernel(
    hidden, residual, chosen, short_hidden, short_residual, kept, present, shorter, channels,
    hidden_batch, hidden_token, residual_batch, residual_token,
    BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves a row from the long streams (any strides) to the short ones (contiguous), or back."""
    place, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    named = tl.load(chosen + batch * kept + place, mask=place < kept, other=0)
    token = tl.where(place < kept, named, place - kept + present)
    d = tl.arange(0, BLOCK)
    inside = d < channels
    row = (batch * shorter + place) * channels
    hidden += batch * hidden_batch + token * hidden_token
    residual += batch * residual_batch + token * residual_token
    if BACK:
        _move(short_hidden + row, hidden, d, inside)
        _move(short_residual + row, residual, d, inside)
    else:
        _move(hidden, short_hidden + row, d, inside)
        _move(residual, short_residual + row, d, inside)


def _run(hidden: Tensor, residual: Tensor, chosen: Tensor, short: tuple[Tensor, Tensor], present: int, back: bool):  # noqa: ANN202
    batch, shorter, channels = short[0].shape
    if short[0].numel() == 0:
        return
    block = triton.next_power_of_2(channels)
    warps = min(MAX_WARPS, max(1, block // (32 * PER_THREAD)))
    with torch.cuda.device_of(hidden):
        _tokens_kernel[(shorter, batch)](
            hidden, residual, chosen.contiguous(), *short, chosen.shape[1], present, shorter, channels,
            *hidden.stride()[:2], *residual.stride()[:2], back, block, num_warps=warps,
        )  # fmt: skip


@torch.library.custom_op("simba_lab::keep_tokens_triton", mutates_args=())
def _keep(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    short = _shortened(hidden, residual, chosen, present)
    _run(last_contiguous(hidden), last_contiguous(residual), chosen, short, present, back=False)
    return short


def _shortened(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    """Both streams, unfilled."""
    batch, length, channels = hidden.shape
    shape = (batch, chosen.shape[1] + length - present, channels)
    return hidden.new_empty(shape), residual.new_empty(shape)


@_keep.register_fake
def _(hidden, residual, chosen, present):  # noqa: ANN001, ANN202
    return _shortened(hidden, residual, chosen, present)


@torch.library.custom_op("simba_lab::keep_tokens_backward_triton", mutates_args=())
def _keep_backward(
    dhidden: Tensor, dresidual: Tensor, chosen: Tensor, present: int, length: int
) -> tuple[Tensor, Tensor]:
    long = _lengthened(dhidden, dresidual, length)
    _run(*long, chosen, (dhidden.contiguous(), dresidual.contiguous()), present, back=True)
    return long


def _lengthened(dhidden: Tensor, dresidual: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Gradients of both streams before tokens were dropped: zeros."""
    batch, _, channels = dhidden.shape
    shape = (batch, length, channels)
    return dhidden.new_zeros(shape), dresidual.new_zeros(shape)


@_keep_backward.register_fake
def _(dhidden, dresidual, chosen, present, length):  # noqa: ANN001, ANN202
    return _lengthened(dhidden, dresidual, length)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    hidden, _, chosen, present = inputs
    ctx.save_for_backward(chosen)
    ctx.present, ctx.length = present, hidden.shape[1]


def _gradients(ctx, dhidden, dresidual):  # noqa: ANN001, ANN202
    return *_keep_backward(dhidden, dresidual, ctx.saved_tensors[0], ctx.present, ctx.length), None, None


_keep.register_autograd(_gradients, setup_context=_context)


def keep_tokens(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_tokens`."""
    return _keep(hidden, residual, chosen, present)
