"""Projections on CPUs.

torch sends fp32 products to MKL, which on AMD processors reaches about half of what oneDNN does (forward and gradient
of the input, shapes of this project, two cores of an AMD EPYC). oneDNN is asked for by the operator that torch's own
compiler emits for CPUs; where it is missing, and for other dtypes, torch's default runs. On Intel's processors both
are alike, but MKL needs no transposed copy for the gradient of a weight: a training step takes 8 % less with it there.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system than Linux
        return False


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if not _has_onednn():
        return F.linear(x, weight)
    return _onednn(x.contiguous(), weight.contiguous())


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _weight_gradient(x: Tensor, dout: Tensor) -> Tensor:
    """``dout`` (tokens, d_out) transposed times ``x`` (tokens, d_in): (d_out, d_in), perhaps transposed in memory.

    oneDNN wants the left factor in rows, so one of the two is transposed first: the narrower, which costs little. The
    right factor may stand transposed, if it has no gaps: with gaps oneDNN falls back to a loop 1,000 times slower.
    """
    if not _has_onednn() or _is_intel() or x.shape[0] == 0:
        return dout.t() @ x
    x, dout = x.contiguous(), dout.contiguous()
    if x.shape[1] <= dout.shape[1]:
        return _onednn(x.t().contiguous(), dout.t()).t()
    return _onednn(dout.t().contiguous(), x.t())


@torch.library.custom_op("simba_lab::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return _product(x, weight)


@_linear.register_fake
def _(x, weight):  # noqa: ANN001, ANN202
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("simba_lab::linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(x: Tensor, weight: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    dx = _product(dout, weight.t())
    dweight = _weight_gradient(x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1]))
    return dx, dweight


@_linear_backward.register_fake
def _(x, weight, dout):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape), torch.empty_like(weight)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dout):  # noqa: ANN001, ANN202
    return _linear_backward(*ctx.saved_tensors, dout)


_linear.register_autograd(_gradients, setup_context=_context)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (..., d_in) times ``weight`` (d_out, d_in) transposed: (..., d_out)."""
    return _linear(x, weight) if x.dtype == torch.float32 and x.numel() else F.linear(x, weight)
