"""Projections and norms on CPUs.

torch sends fp32 products to MKL, which on AMD processors reaches about half of what oneDNN does (forward and gradient
of the input, shapes of this project, two cores of an AMD EPYC). oneDNN is asked for by the operator that torch's own
compiler emits for CPUs; where it is missing, and for other dtypes, torch's default runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.kernels import reference


def use_torch_threads() -> None:
    """Numba follows ``torch.set_num_threads``, so that one setting rules the process; freed memory stays in it."""
    import numba

    from simba_lab.kernels.cpu.memory import keep_freed

    keep_freed()

    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba's OpenMP pool, started just now, has set torch's number to its own
        torch.set_num_threads(threads)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    if not _has_onednn() or x.shape[0] == 0:
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


@torch.library.custom_op("simba_lab::add_rms_norm", mutates_args=(), device_types="cpu")
def _norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from simba_lab.kernels.cpu import norm

    use_torch_threads()
    normed, stream = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    inverse = hidden.new_empty(hidden.shape[:-1])
    before = hidden if residual is None else residual
    norm.forward(
        rows(hidden), rows(before), residual is not None, rows(weight)[0], inverse.numpy().dtype.type(eps),
        rows(normed), rows(stream), inverse.view(-1).numpy(),
    )  # fmt: skip
    return normed, stream, inverse


def rows(t: Tensor):  # noqa: ANN201 - numpy array
    """(..., channels) as an array (tokens, channels), sharing memory where it can."""
    return t.detach().contiguous().view(-1, t.shape[-1]).numpy()


@_norm.register_fake
def _(hidden, residual, weight, eps):  # noqa: ANN001, ANN202
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[:-1])


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
    ctx.save_for_backward(output[1], output[2], inputs[2])
    ctx.has_residual = inputs[1] is not None
    ctx.set_materialize_grads(False)


def _norm_gradients(ctx, dnormed, dstream, _):  # noqa: ANN001, ANN202
    stream = ctx.saved_tensors[0]
    dnormed, dstream = (stream.new_zeros(stream.shape) if grad is None else grad for grad in (dnormed, dstream))
    dinput, dweight = _norm_backward(*ctx.saved_tensors, dnormed, dstream)
    return dinput, dinput if ctx.has_residual else None, dweight, None


_norm.register_autograd(_norm_gradients, setup_context=_norm_context)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.add_rms_norm`; half precision takes the reference's way."""
    if hidden.dtype not in (torch.float32, torch.float64) or weight.dtype != hidden.dtype:
        return reference.add_rms_norm(hidden, residual, weight, eps)
    normed, stream, _ = _norm(hidden, residual, weight, eps)
    return normed, stream
