"""The selective scan as an operation: Triton kernels behind ``torch.library``, with gradients and shape inference."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu import launch
from simba_lab.kernels.gpu.scan_backward import scan_backward, scan_carry
from simba_lab.kernels.gpu.scan_forward import scan_forward, scan_states
from simba_lab.kernels.gpu.scan_step import scan_step

STEPS = 8
WINDOW = 64
"""Steps between the states kept for the backward pass, which recomputes those in between."""


def _paired(B: Tensor, C: Tensor) -> bool:
    """Whether the vectors can be read as pairs of bf16 in one word."""
    return all(
        t.dtype == torch.bfloat16 and not (t.shape[2] | t.stride(0) | t.stride(1) | t.storage_offset()) & 1
        for t in (B, C)
    )


def _partial(B: Tensor) -> torch.dtype:
    return torch.bfloat16 if B.dtype == torch.bfloat16 else torch.float32


def _empty_outputs(x: Tensor, A: Tensor, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled output (B, L, D), final state (B, D, N) and, if wanted, states at the starts of windows."""
    (batch, length, channels), n = x.shape, A.shape[1]
    windows = -(-length // WINDOW) if keep_states else 0
    fp32 = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty(batch, length, channels, dtype=x.dtype, device=x.device),
        torch.empty(batch, channels, n, **fp32),
        torch.empty(batch, windows, channels, n, **fp32),
    )


@torch.library.custom_op("simba_lab::selective_scan_triton", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    initial: Tensor | None, keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, channels), (n, states) = x.shape, (A.shape[1], triton.next_power_of_2(A.shape[1]))
    out, final, starts = _empty_outputs(x, A, keep_states)
    if length == 1 and initial is not None and not keep_states:
        block = launch.step_block(states)
        scan_step[(triton.cdiv(channels, block), batch)](
            x, dt, z, B, C, dt_bias, A, D, initial, out, final,
            channels, x.stride(0), dt.stride(0), z.stride(0), B.stride(0), C.stride(0),
            N=n, STATES=states, BLOCK=block, FAST=launch.on_gpu(x), num_warps=launch.STEP_WARPS,
        )  # fmt: skip
        return out, final, starts
    block, stages = launch.forward_block(batch, channels, states, x.device)
    fixed = {
        "N": n, "STATES": states, "BLOCK": block, "INITIAL": initial is not None, "FAST": launch.on_gpu(x),
        "PAIRED": _paired(B, C), "STAGES": stages, "num_warps": 1,
    }  # fmt: skip

    def scan(first: int, programs: int, span: int, segments: int, boundaries: Tensor | None) -> None:
        scan_forward[(programs, segments)](
            x, dt, z, B, C, dt_bias, A, D, initial, boundaries, out, final, starts,
            length, channels, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), z.stride(0), z.stride(1),
            B.stride(0), B.stride(1), C.stride(0), C.stride(1), first, span, segments,
            EVERY=WINDOW if keep_states else 0, SPLIT=segments > 1, **fixed,
        )  # fmt: skip

    programs = batch * triton.cdiv(channels, block)
    whole, segments = launch.forward_split(programs, length // WINDOW, x.device)
    if segments == 1:
        scan(0, programs, length, 1, None)
        return out, final, starts
    span = triton.cdiv(length, segments * WINDOW) * WINDOW
    segments = triton.cdiv(length, span)
    boundaries = torch.empty(programs - whole, segments - 1, block, states, dtype=torch.float32, device=x.device)

    def rest() -> None:
        scan_states[(programs - whole,)](
            x, dt, B, dt_bias, A, initial, boundaries,
            length, channels, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), B.stride(0), B.stride(1),
            whole, span, segments, **fixed,
        )  # fmt: skip
        scan(whole, programs - whole, span, segments, boundaries)

    launch.side_by_side(rest, lambda: scan(0, whole, length, 1, None) if whole else None, x.device)
    return out, final, starts


@_scan.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, initial, keep_states):  # noqa: ANN001, ANN202
    return _empty_outputs(x, A, keep_states)


@torch.library.custom_op("simba_lab::selective_scan_backward_triton", mutates_args=())
def _scan_backward(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, starts: Tensor,
    dout: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, length, channels = x.shape
    n, states, windows = A.shape[1], triton.next_power_of_2(A.shape[1]), starts.shape[1]
    blocks = triton.cdiv(channels, launch.BLOCK)
    span = -(-windows // launch.segments(batch * blocks, windows, x.device))
    segments = -(-windows // span)
    fp32 = {"dtype": torch.float32, "device": x.device}
    carry = torch.empty(batch, segments, channels, n, **fp32)
    carry[:, -1] = 0.0 if dfinal is None else dfinal
    dout = dout.contiguous()
    dx, ddt, dz = (torch.empty(dout.shape, dtype=t.dtype, device=t.device) for t in (x, dt, z))
    # One partial sum to a block of channels; in bf16 they are no coarser than the gradient itself.
    dB, dC = torch.empty(2, blocks, batch, length, n, dtype=_partial(B), device=x.device).unbind()
    dA, dinitial = torch.empty_like(carry), torch.empty(batch, channels, n, **fp32)
    dD, dbias = torch.empty(2, batch, segments, channels, **fp32).unbind()
    scratch = torch.empty(batch, segments, blocks, WINDOW // STEPS, launch.BLOCK, states, **fp32)
    fast = launch.on_gpu(x)
    if segments > 1:
        scan_carry[(blocks, batch)](
            dt, z, C, dt_bias, A, dout, carry,
            length, channels, dt.stride(0), dt.stride(1), z.stride(0), z.stride(1),
            C.stride(0), C.stride(1), span * WINDOW, segments,
            N=n, STATES=states, BLOCK=launch.BLOCK, FAST=fast, PAIRED=_paired(B, C), STAGES=launch.BACKWARD_STAGES,
            num_warps=1,
        )  # fmt: skip
    scan_backward[(blocks, batch, segments)](
        x, dt, z, B, C, dt_bias, A, D, starts, dout, carry,
        dx, ddt, dz, dB, dC, dA, dD, dbias, dinitial, scratch,
        length, channels, x.stride(0), x.stride(1), dt.stride(0), dt.stride(1), z.stride(0), z.stride(1),
        B.stride(0), B.stride(1), C.stride(0), C.stride(1), span,
        N=n, STATES=states, BLOCK=launch.BLOCK, EVERY=WINDOW, FAST=fast, PAIRED=_paired(B, C),
        STAGES=launch.BACKWARD_STAGES, num_warps=1,
    )  # fmt: skip
    return dx, ddt, dbias.sum((0, 1)), dA.sum((0, 1)), dB.sum(0), dC.sum(0), dD.sum((0, 1)), dz, dinitial


@_scan_backward.register_fake
def _(x, dt, dt_bias, A, B, C, D, z, starts, dout, dfinal):  # noqa: ANN001, ANN202
    batch, length, channels = x.shape
    n, fp32 = A.shape[1], {"dtype": torch.float32, "device": x.device}
    per_token = [torch.empty(batch, length, channels, dtype=t.dtype, device=t.device) for t in (x, dt, z)]
    dB, dC = (torch.empty(batch, length, n, dtype=_partial(B), device=x.device) for _ in range(2))
    dbias, dD = (torch.empty(channels, **fp32) for _ in range(2))
    dA, dinitial = torch.empty(channels, n, **fp32), torch.empty(batch, channels, n, **fp32)
    return per_token[0], per_token[1], dbias, dA, dB, dC, dD, per_token[2], dinitial


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    x, dt, dt_bias, A, B, C, D, z, initial, _ = inputs
    ctx.save_for_backward(x, dt, dt_bias, A, B, C, D, z, output[2])
    ctx.dtypes = [t.dtype for t in (dt_bias, A, B, C, D)]
    ctx.initial = None if initial is None else initial.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dfinal, _):  # noqa: ANN001, ANN202
    x = ctx.saved_tensors[0]
    dout = torch.zeros_like(x, memory_format=torch.contiguous_format) if dout is None else dout
    dx, ddt, dbias, dA, dB, dC, dD, dz, dinitial = _scan_backward(*ctx.saved_tensors, dout, dfinal)
    bias_type, A_type, B_type, C_type, D_type = ctx.dtypes
    return (
        dx, ddt, dbias.to(bias_type), dA.to(A_type), dB.to(B_type), dC.to(C_type), dD.to(D_type), dz,
        None if ctx.initial is None else dinitial.to(ctx.initial), None,
    )  # fmt: skip


_scan.register_autograd(_gradients, setup_context=_context)


def selective_scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.selective_scan`; arithmetic in fp32 whatever the dtype.

    Raises InputError for fp64, which this backend does not compute in.
    """
    if x.dtype == torch.float64:
        raise InputError("backend: triton scans in fp32; use backend reference for fp64")
    if x.shape[1] == 0:
        empty = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32)
        return torch.empty_like(x), empty if initial is None else initial.float()
    # Only what is per token may be strided: a slice of a wider tensor.
    A, initial = A.contiguous(), None if initial is None else initial.contiguous()
    inputs = [t if t is None else launch.last_contiguous(t) for t in (x, dt, dt_bias, A, B, C, D, z, initial)]
    keep_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    out, final, _ = _scan(*inputs, keep_states)
    return out, final
