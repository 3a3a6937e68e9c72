"""The CPU backend: torch tensors in, Numba kernels, torch tensors out, as custom ops that autograd and tracers see.

The ops are named ``simba_lab::*``; their fake implementations make them run on the ``meta`` device, where the FLOPs
counter traces them whatever backend will execute the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.cpu.arrays import as_array, computable, flat_views
from simba_lab.kernels.cpu.dense import linear as linear
from simba_lab.kernels.cpu.gather import keep_tokens as keep_tokens
from simba_lab.kernels.cpu.gather import select_tokens as select_tokens
from simba_lab.kernels.cpu.impact_ops import global_impact as global_impact
from simba_lab.kernels.cpu.mamba2 import gated_rms_norm as gated_rms_norm
from simba_lab.kernels.cpu.mamba2 import ssd as ssd
from simba_lab.kernels.cpu.mamba2 import ssd_impact as ssd_impact
from simba_lab.kernels.cpu.norm_ops import add_rms_norm as add_rms_norm
from simba_lab.kernels.cpu.norm_ops import keep_add_rms_norm as keep_add_rms_norm
from simba_lab.kernels.cpu.scan_ops import scored_scan as scored_scan
from simba_lab.kernels.cpu.scan_ops import selective_scan as selective_scan
from simba_lab.kernels.cpu.threads import use_torch_threads
from simba_lab.kernels.reference import cross_entropy as cross_entropy
from simba_lab.kernels.reference import true_neighbours as true_neighbours


@torch.library.custom_op("simba_lab::causal_conv", mutates_args=(), device_types="cpu")
def _conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, neighbours: Tensor) -> Tensor:
    from simba_lab.kernels.cpu import conv

    use_torch_threads()
    out = x.new_empty(x.shape)
    (x_,), strides = flat_views(x)
    conv.forward(
        x_, strides[0], as_array(weight.t()), as_array(bias[None]), as_array(initial), as_array(neighbours), x.shape[1],
        out.view(-1).numpy(),
    )  # fmt: skip
    return out


@_conv.register_fake
def _(x, weight, bias, initial, neighbours):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape)


@torch.library.custom_op("simba_lab::causal_conv_backward", mutates_args=(), device_types="cpu")
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, neighbours: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from simba_lab.kernels.cpu import conv

    use_torch_threads()
    batch, length, channels = x.shape
    jobs = batch * -(-length // conv.STRETCH)
    dx, dinitial = x.new_empty(batch, length, channels), torch.zeros_like(initial)
    dweight, dbias = x.new_empty(jobs, weight.shape[1], channels), x.new_empty(jobs, channels)
    (x_,), strides = flat_views(x)
    conv.backward(
        x_, strides[0], as_array(weight.t()), as_array(bias[None]), as_array(initial), as_array(neighbours),
        as_array(dout).reshape(-1), length, dx.view(-1).numpy(), dweight.numpy(), dbias.numpy(), dinitial.numpy(),
    )  # fmt: skip
    return dx, dweight.sum(0).t().contiguous(), dbias.sum(0), dinitial


def _conv_context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx, dout):  # noqa: ANN001, ANN202
    return *_conv_backward(*ctx.saved_tensors, dout), None


_conv.register_autograd(_conv_gradients, setup_context=_conv_context)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.causal_conv`."""
    dtype, before = x.dtype, weight.shape[1] - 1
    if initial is None:
        initial = x.new_zeros(x.shape[0], before, x.shape[2])
    last = torch.cat([initial.to(dtype), x[:, max(0, x.shape[1] - before) :]], dim=1)
    everyone = torch.empty(0, 0, dtype=torch.int64, device=x.device)
    out = _conv(*map(computable, (x, weight, bias, initial)), everyone)
    return out.to(dtype), last[:, last.shape[1] - before :]


def neighbour_conv(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.neighbour_conv`."""
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    out = _conv(*map(computable, (x, weight, bias, before)), neighbours)
    return out.to(x.dtype), reference.last_neighbours(x, weight.shape[1], neighbours)
