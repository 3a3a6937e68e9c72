"""Residual addition and RMS norm as an op that autograd and tracers see: of all tokens, or of those that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.cpu.arrays import rows
from simba_lab.kernels.cpu.gather import kept_rows
from simba_lab.kernels.cpu.threads import use_torch_threads


@torch.library.custom_op("simba_lab::add_rms_norm", mutates_args=(), device_types="cpu")
def _norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``index`` (B, k): rows of all sequences, one after the other, that are taken of the two streams; empty, all."""
    from simba_lab.kernels.cpu import norm

    use_torch_threads()
    normed, stream, inverse = _norm_outputs(hidden, index)
    before, scales = hidden if residual is None else residual, inverse.view(-1).numpy()
    norm.forward(
        rows(hidden), rows(before), residual is not None, index.view(-1).numpy(), rows(weight)[0],
        scales.dtype.type(eps), rows(normed), rows(stream), scales,
    )  # fmt: skip
    return normed, stream, inverse


def _norm_outputs(hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens = index.shape if index.numel() else hidden.shape[:-1]
    wide = (*tokens, hidden.shape[-1])
    return hidden.new_empty(wide), hidden.new_empty(wide), hidden.new_empty(tokens)


@_norm.register_fake
def _(hidden, residual, weight, eps, index):  # noqa: ANN001, ANN202
    return _norm_outputs(hidden, index)


@torch.library.custom_op("simba_lab::add_rms_norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    stream: Tensor, inverse: Tensor, weight: Tensor, dnormed: Tensor, dstream: Tensor
) -> tuple[Tensor, Tensor]:
    from simba_lab.kernels.cpu import norm

    use_torch_threads()
    dinput = stream.new_empty(stream.shape)
    dweight = stream.new_empty(-(-inverse.numel() // norm.STRETCH), stream.shape[-1])
    norm.backward(
        rows(stream), inverse.contiguous().view(-1).numpy(), rows(weight)[0], rows(dnormed), rows(dstream),
        rows(dinput), dweight.numpy(),
    )  # fmt: skip
    return dinput, dweight.sum(0)


def _norm_context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(output[1], output[2], inputs[2], inputs[4])
    ctx.has_residual, ctx.shape = inputs[1] is not None, inputs[0].shape
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx, dnormed, dstream, _):  # noqa: ANN001, ANN202
    *saved, index = ctx.saved_tensors
    stream = saved[0]
    dnormed, dstream = (stream.new_zeros(stream.shape) if grad is None else grad for grad in (dnormed, dstream))
    dinput, dweight = _norm_backward(*saved, dnormed, dstream)
    if index.numel():
        everyone = dinput.new_zeros(ctx.shape)
        everyone.view(-1, ctx.shape[-1]).index_copy_(0, index.flatten(), dinput.flatten(0, 1))
        dinput = everyone
    return dinput, dinput if ctx.has_residual else None, dweight, None, None


_norm.register_autograd(_norm_gradients, setup_context=_norm_context)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.add_rms_norm`; half precision takes the reference's way."""
    if not _is_ours(hidden, weight):
        return reference.add_rms_norm(hidden, residual, weight, eps)
    return _norm(hidden, residual, weight, eps, torch.empty(0, dtype=torch.int64, device=hidden.device))[:2]


def keep_add_rms_norm(
    hidden: Tensor, residual: Tensor, chosen: Tensor, present: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_add_rms_norm`; the streams are read where they are."""
    if not _is_ours(hidden, weight):
        return reference.keep_add_rms_norm(hidden, residual, chosen, present, weight, eps)
    return _norm(hidden, residual, weight, eps, kept_rows(hidden.shape, chosen, present))[:2]


def _is_ours(hidden: Tensor, weight: Tensor) -> bool:
    return hidden.dtype in (torch.float32, torch.float64) and weight.dtype == hidden.dtype
