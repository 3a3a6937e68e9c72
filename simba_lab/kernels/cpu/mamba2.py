"""The ops of Mamba-2 on CPUs: the scan in chunks, the impact of tokens, the gated norm."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.cpu.arrays import rows
from simba_lab.kernels.cpu.threads import use_torch_threads

CHUNK = 128
"""Most tokens in a chunk: decays cost as much per token and head, products between chunks 2 N P. Of 32, 64, 128 and
256 the fastest for P = 64 and N = 128 on a core of an AMD EPYC."""


@torch.library.custom_op("simba_lab::ssd", mutates_args=(), device_types="cpu")
def _ssd(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, chunk: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import chunked

    use_torch_threads()
    out, _, starts = _outputs(x, delta, A, B, C, D, initial, chunk, keep_states)
    return out, chunked.forward(x, delta, A, B, C, D, initial, out, starts, chunk), starts


@_ssd.register_fake
def _outputs(x, delta, A, B, C, D, initial, chunk, keep_states):  # noqa: ANN001, ANN202
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    chunks = -(-length // chunk) if keep_states else 0
    starts = x.new_empty(chunks, batch, groups, states, heads // groups * width)
    return x.new_empty(x.shape), initial.new_empty(initial.shape), starts


@torch.library.custom_op("simba_lab::ssd_backward", mutates_args=(), device_types="cpu")
def _ssd_backward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor, dout: Tensor, dfinal: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import chunked

    use_torch_threads()
    return chunked.backward(x, delta, A, B, C, D, starts, dout, dfinal, chunk)


@_ssd_backward.register_fake
def _(x, delta, A, B, C, D, starts, dout, dfinal, chunk):  # noqa: ANN001, ANN202
    return tuple(t.new_empty(t.shape) for t in (x, delta, A, B, C, D, dfinal))


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    x, delta, A, B, C, D, initial, ctx.chunk, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, output[2])
    ctx.state_shape = initial.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dfinal, _):  # noqa: ANN001, ANN202
    x = ctx.saved_tensors[0]
    dout = x.new_zeros(x.shape) if dout is None else dout
    dfinal = x.new_zeros(ctx.state_shape) if dfinal is None else dfinal
    return *_ssd_backward(*ctx.saved_tensors, dout, dfinal, ctx.chunk), None, None


_ssd.register_autograd(_gradients, setup_context=_context)


def ssd(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd`; a chunk has ``chunk_size`` tokens, but not more than CHUNK."""
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = reference.step_size(dt, dt_bias).to(wide)
    if initial is None:
        initial = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=wide)
    inputs = (x.to(wide), delta, *(t.to(wide) for t in (A, B, C, D, initial)))
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, final, _ = _ssd(*inputs, min(chunk_size, CHUNK), keep_states)
    return out.to(x.dtype), final


@torch.library.custom_op("simba_lab::ssd_impact", mutates_args=(), device_types="cpu")
def _impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor, reduce: str,
    gated: bool,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    delta = reference.step_size(dt, dt_bias).to(wide)
    x, A, B, C_boundary, gate = (t.to(wide) for t in (x, A, B, C_boundary, gate))
    impact = reference.ssd_impact_per_channel(x, delta, A, B, C_boundary)
    return reference.reduce_channels(impact.mul_(gate[:, None]).flatten(2), reduce)


@_impact.register_fake
def _(x, dt, dt_bias, A, B, C_boundary, gate, reduce, gated):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))


def ssd_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd_impact`; scores carry no gradient."""
    with torch.no_grad():
        weight = x.new_ones(1) if gate is None else gate
        return _impact(x, dt, dt_bias, A, B, C_boundary, weight, reduce, gate is not None)


@torch.library.custom_op("simba_lab::gated_rms_norm", mutates_args=(), device_types="cpu")
def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    from simba_lab.kernels.cpu import gated_norm

    use_torch_threads()
    out, inverse = _gated_outputs(y, z, weight, eps, groups)
    gated_norm.forward(
        rows(y),
        rows(z),
        rows(weight)[0],
        inverse.numpy().dtype.type(eps),
        rows(out),
        rows(inverse),
    )
    return out, inverse


@_gated_norm.register_fake
def _gated_outputs(y, z, weight, eps, groups):  # noqa: ANN001, ANN202
    return y.new_empty(y.shape), y.new_empty(*y.shape[:-1], groups)


@torch.library.custom_op("simba_lab::gated_rms_norm_backward", mutates_args=(), device_types="cpu")
def _gated_norm_backward(
    y: Tensor, z: Tensor, weight: Tensor, inverse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from simba_lab.kernels.cpu import gated_norm

    use_torch_threads()
    dy, dz = y.new_empty(y.shape), y.new_empty(y.shape)
    dweight = y.new_empty(-(-(y.numel() // y.shape[-1]) // gated_norm.STRETCH), y.shape[-1])
    gated_norm.backward(
        rows(y),
        rows(z),
        rows(weight)[0],
        rows(inverse),
        rows(dout),
        rows(dy),
        rows(dz),
        dweight.numpy(),
    )
    return dy, dz, dweight.sum(0)


@_gated_norm_backward.register_fake
def _(y, z, weight, inverse, dout):  # noqa: ANN001, ANN202
    return y.new_empty(y.shape), y.new_empty(y.shape), torch.empty_like(weight)


def _gated_context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs[:3], output[1])


def _gated_gradients(ctx, dout, _):  # noqa: ANN001, ANN202
    return *_gated_norm_backward(*ctx.saved_tensors, dout), None, None


_gated_norm.register_autograd(_gated_gradients, setup_context=_gated_context)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """See :func:`simba_lab.kernels.reference.gated_rms_norm`; half precision is computed in single."""
    dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
    return _gated_norm(y.to(wide), z.to(wide), weight.to(wide), eps, groups)[0].to(dtype)
