"""The selective scan as ops that autograd and tracers see: alone, and scoring the context on its way."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels.cpu.arrays import as_array, computable, flat_views
from simba_lab.kernels.cpu.impact_ops import over_jobs, reading, vanished
from simba_lab.kernels.cpu.threads import use_torch_threads


def _scan_outputs(x: Tensor, A: Tensor, initial: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled output (B, L, D), final state (B, D, N) and, if wanted, states at the starts of chunks, by block."""
    from simba_lab.kernels.cpu.scan_forward import CHUNK, WIDTH

    batch, length, channels = x.shape
    chunks = -(-length // CHUNK) if keep_states else 0
    starts = x.new_empty(batch, chunks, -(-channels // WIDTH), A.shape[1] * WIDTH)
    return x.new_empty(x.shape), initial.new_empty(initial.shape), starts


@torch.library.custom_op("simba_lab::selective_scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, initial: Tensor,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import scan_forward

    use_torch_threads()
    out, final, starts = _scan_outputs(x, A, initial, keep_states)
    (x_, dt_, B_, C_, z_), strides = flat_views(x, dt, B, C, z)
    scan_forward.forward(
        x_, dt_, as_array(dt_bias), as_array(A), B_, C_, as_array(D), z_, strides, as_array(initial),
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
    from simba_lab.kernels.cpu import scan_backward

    use_torch_threads()
    batch, length, channels = x.shape
    states, blocks = A.shape[1], starts.shape[2]
    dx, ddt, dz = (x.new_empty(batch, length, channels) for _ in range(3))
    dA, dinitial = x.new_empty(2, batch, channels, states).unbind()
    dB, dC = x.new_empty(2, batch, blocks, length, states).unbind()
    dD = x.new_empty(batch, channels)
    (x_, dt_, B_, C_, z_, dout_), strides = flat_views(x, dt, B, C, z, dout)
    scan_backward.backward(
        x_, dt_, as_array(dt_bias), as_array(A), B_, C_, as_array(D), z_, dout_, strides, as_array(starts),
        as_array(dfinal), dx.view(-1).numpy(), ddt.view(-1).numpy(), dA.numpy(), dB.view(-1).numpy(),
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
    inputs, keep_states = _prepared(x, dt, dt_bias, A, B, C, D, z, initial)
    out, final, _ = _scan(*inputs, keep_states)
    return out.to(x.dtype), final


def _prepared(*tensors: Tensor | None) -> tuple[list[Tensor], bool]:
    """Arguments of the scan in a dtype that the kernels know, and whether the backward pass will need states."""
    x, dt, dt_bias, A, B, C, D, z, initial = tensors
    x, A = computable(x), computable(A)
    initial = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]) if initial is None else initial.to(x.dtype)
    inputs = [x, *map(computable, (dt, dt_bias)), A, *map(computable, (B, C, D, z)), initial]
    return inputs, torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


@torch.library.custom_op("simba_lab::scored_scan", mutates_args=(), device_types="cpu")
def _scored(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, initial: Tensor,
    keep_states: bool, weight: Tensor, present: int, reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from simba_lab.kernels.cpu import impact, scan_forward, scan_scored

    use_torch_threads()
    out, final, starts = _scan_outputs(x, A, initial, keep_states)
    best = x.new_empty(x.shape[0], -(-x.shape[2] // scan_forward.WIDTH), present)
    found = best.view(-1).numpy()
    weights = reading(B.detach()[:, :present], C.detach()[:, present - 1], scan_forward.TOGETHER)
    (x_, dt_, B_, C_, z_), strides = flat_views(x, dt, B, C, z)
    scan_scored.forward(
        x_, dt_, as_array(dt_bias), as_array(A), B_, C_, as_array(D), z_, strides, as_array(initial),
        out.view(-1).numpy(), final.numpy(), starts.numpy(), weights, as_array(weight), present,
        impact.REDUCTIONS[reduce], vanished(found), found,
    )  # fmt: skip
    return out, final, starts, over_jobs(best, reduce)


@_scored.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, initial, keep_states, weight, present, reduce):  # noqa: ANN001, ANN202
    return *_scan_outputs(x, A, initial, keep_states), x.new_empty(x.shape[0], present)


def _scored_context(ctx, inputs, output) -> None:  # noqa: ANN001
    _scan_context(ctx, inputs[:10], output)


def _scored_gradients(ctx, dout, dfinal, dstarts, dscores):  # noqa: ANN001, ANN202
    return *_scan_gradients(ctx, dout, dfinal, dstarts), None, None, None


_scored.register_autograd(_scored_gradients, setup_context=_scored_context)


def scored_scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    initial: Tensor | None, weight: Tensor | None, present: int, reduce: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`selective_scan`, and as a third result :func:`global_impact` of the first ``present`` of its tokens.

    ``weight`` (B, D) is the impact's ``gate``. Scores (B, present) carry no gradient; the rest does, to the bit as in
    :func:`selective_scan`.
    """
    inputs, keep_states = _prepared(x, dt, dt_bias, A, B, C, D, z, initial)
    weight = inputs[0].new_ones(x.shape[0], x.shape[2]) if weight is None else computable(weight.detach())
    out, final, _, scores = _scored(*inputs, keep_states, weight, present, reduce)
    return out.to(x.dtype), final, scores.detach()
