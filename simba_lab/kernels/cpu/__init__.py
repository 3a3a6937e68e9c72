"""The CPU backend: torch tensors in, Numba kernels, torch tensors out, as custom ops that autograd and tracers see.

The ops are named ``simba_lab::*``; their fake implementations make them run on the ``meta`` device, where the FLOPs
counter traces them whatever backend will execute the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.cpu.dense import add_rms_norm as add_rms_norm
from simba_lab.kernels.cpu.dense import linear as linear
from simba_lab.kernels.cpu.dense import use_torch_threads
from simba_lab.kernels.cpu.gather import keep_tokens as keep_tokens
from simba_lab.kernels.cpu.gather import select_tokens as select_tokens
from simba_lab.kernels.cpu.mamba2 import gated_rms_norm as gated_rms_norm
from simba_lab.kernels.cpu.mamba2 import ssd as ssd
from simba_lab.kernels.cpu.mamba2 import ssd_impact as ssd_impact
from simba_lab.kernels.reference import cross_entropy as cross_entropy
from simba_lab.kernels.reference import true_neighbours as true_neighbours


def keep_add_rms_norm(
    hidden: Tensor, residual: Tensor, chosen: Tensor, present: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_add_rms_norm`."""
    return add_rms_norm(*keep_tokens(hidden, residual, chosen, present), weight, eps)


_COMPUTE = {torch.float32: torch.float32, torch.float64: torch.float64}


def _computable(t: Tensor) -> Tensor:
    """fp32 for half precision; fp32 and fp64 stay."""
    return t.to(_COMPUTE.get(t.dtype, torch.float32))


def _strided(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Flat view over the memory of (B, L, D) with contiguous channels, and its strides (batch, token)."""
    if t.stride(2) != 1 or t.numel() == 0:
        t = t.contiguous()
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return t.as_strided((span if t.numel() else 0,), (1,)), (t.stride(0), t.stride(1))


def _flat(*tensors: Tensor):  # noqa: ANN202 - (list of arrays, int64 array of strides)
    import numpy as np

    views = [_strided(t.detach()) for t in tensors]
    return [flat.numpy() for flat, _ in views], np.array([strides for _, strides in views], np.int64)


def _array(t: Tensor):  # noqa: ANN202 - numpy array sharing the memory of a contiguous copy
    return t.detach().contiguous().numpy()


def _scan_outputs(x: Tensor, A: Tensor, initial: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled output (B, L, D), final state (B, D, N) and, if wanted, states at the starts of chunks, by block."""
    from simba_lab.kernels.cpu import scan

    batch, length, channels = x.shape
    chunks = -(-length // scan.CHUNK) if keep_states else 0
    starts = x.new_empty(batch, chunks, -(-channels // scan.WIDTH), A.shape[1] * scan.WIDTH)
    return x.new_empty(x.shape), initial.new_empty(initial.shape), starts


@torch.library.custom_op("simba_lab::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, initial: Tensor,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import scan

    use_torch_threads()
    out, final, starts = _scan_outputs(x, A, initial, keep_states)
    (x_, dt_, B_, C_, z_), strides = _flat(x, dt, B, C, z)
    scan.forward(
        x_, dt_, _array(dt_bias), _array(A), B_, C_, _array(D), z_, strides, _array(initial),
        out.view(-1).numpy(), final.numpy(), starts.numpy(),
    )  # fmt: skip
    return out, final, starts


@_scan.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, initial, keep_states):  # noqa: ANN001, ANN202
    return _scan_outputs(x, A, initial, keep_states)


@torch.library.custom_op("simba_lab::selective_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, starts: Tensor,
    dout: Tensor, dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import scan

    use_torch_threads()
    batch, length, channels = x.shape
    states, blocks = A.shape[1], starts.shape[2]
    dx, ddt, dz = (x.new_empty(batch, length, channels) for _ in range(3))
    dA, dinitial = x.new_empty(2, batch, channels, states).unbind()
    dB, dC = x.new_empty(2, batch, blocks, length, states).unbind()
    dD = x.new_empty(batch, channels)
    (x_, dt_, B_, C_, z_, dout_), strides = _flat(x, dt, B, C, z, dout)
    scan.backward(
        x_, dt_, _array(dt_bias), _array(A), B_, C_, _array(D), z_, dout_, strides, _array(starts),
        _array(dfinal), dx.view(-1).numpy(), ddt.view(-1).numpy(), dA.numpy(), dB.view(-1).numpy(),
        dC.view(-1).numpy(), dD.numpy(), dz.view(-1).numpy(), dinitial.numpy(),
    )  # fmt: skip
    return dx, ddt, ddt.sum((0, 1)), dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dz, dinitial


def _scan_context(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _scan_gradients(ctx, dout, dfinal, _):  # noqa: ANN001, ANN202
    x, A = ctx.saved_tensors[0], ctx.saved_tensors[3]
    dout = x.new_zeros(x.shape) if dout is None else dout
    dfinal = x.new_zeros(x.shape[0], *A.shape) if dfinal is None else dfinal
    return *_scan_backward(*ctx.saved_tensors, dout, dfinal), None


_scan.register_autograd(_scan_gradients, setup_context=_scan_context)


def selective_scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.selective_scan`."""
    dtype = x.dtype
    x, dt, dt_bias, A, B, C, D, z = map(_computable, (x, dt, dt_bias, A, B, C, D, z))
    if initial is None:
        initial = x.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    inputs = (x, dt, dt_bias, A, B, C, D, z, initial.to(x.dtype))
    keep_states = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    out, final, _ = _scan(*inputs, keep_states)
    return out.to(dtype), final


@torch.library.custom_op("simba_lab::causal_conv", mutates_args=(), device_types="cpu")
def _conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor, neighbours: Tensor) -> Tensor:
    from simba_lab.kernels.cpu import conv

    use_torch_threads()
    out = x.new_empty(x.shape)
    (x_,), strides = _flat(x)
    conv.forward(
        x_, strides[0], _array(weight.t()), _array(bias[None]), _array(initial), _array(neighbours), x.shape[1],
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
    (x_,), strides = _flat(x)
    conv.backward(
        x_, strides[0], _array(weight.t()), _array(bias[None]), _array(initial), _array(neighbours),
        _array(dout).reshape(-1), length, dx.view(-1).numpy(), dweight.numpy(), dbias.numpy(), dinitial.numpy(),
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
    out = _conv(*map(_computable, (x, weight, bias, initial)), everyone)
    return out.to(dtype), last[:, last.shape[1] - before :]


def neighbour_conv(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.neighbour_conv`."""
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    out = _conv(*map(_computable, (x, weight, bias, before)), neighbours)
    return out.to(x.dtype), reference.last_neighbours(x, weight.shape[1], neighbours)


@torch.library.custom_op("simba_lab::global_impact", mutates_args=(), device_types="cpu")
def _impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor, reduce: str,
    gated: bool,
) -> Tensor:  # fmt: skip
    import numpy as np

    from simba_lab.kernels.cpu import impact

    use_torch_threads()
    batch, length, channels = x.shape
    jobs = -(-channels // impact.WIDTH)
    best = x.new_empty(batch, jobs, length)
    (x_, dt_), strides = _flat(x, dt)
    weights, array = (B * C_boundary[:, None]).flatten().numpy(), best.view(-1).numpy()
    vanished = array.dtype.type(np.finfo(array.dtype).minexp)
    code = {"max": impact.MAX, "absmax": impact.ABSMAX, "l2": impact.L2}[reduce]
    impact.scores(
        x_, dt_, _array(dt_bias), _array(A), weights, _array(gate), strides, length, code, vanished, jobs, array
    )  # fmt: skip
    return best.sum(1).sqrt() if reduce == "l2" else best.amax(1)


@_impact.register_fake
def _(x, dt, dt_bias, A, B, C_boundary, gate, reduce, gated):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2])


def global_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.global_impact`; scores carry no gradient."""
    weight = x.new_ones(x.shape[0], x.shape[2]) if gate is None else gate
    with torch.no_grad():
        tensors = map(_computable, (x, dt, dt_bias, A, B, C_boundary, weight))
        return _impact(*tensors, reduce, gate is not None)
