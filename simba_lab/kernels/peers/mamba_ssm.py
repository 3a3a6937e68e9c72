"""The backend ``mamba_ssm``: the scans of the package mamba-ssm, every other op ours.

mamba-ssm keeps activations of Mamba-1 as (batch, channel, length), so each scan turns its arguments round and back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simba_lab.errors import InputError

MAX_STATES = 256


def __getattr__(op: str) -> Callable:
    """Every other op is that of the backend ``triton``."""
    from simba_lab.kernels import gpu

    return getattr(gpu, op)


def _check(x: Tensor, states: int) -> None:
    if x.dtype == torch.float64:
        raise InputError("backend: mamba_ssm scans in fp32; use backend reference for fp64")
    if states > MAX_STATES:
        raise InputError(f"d_state: the mamba_ssm backend takes at most {MAX_STATES}, not {states}")


def selective_scan(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.selective_scan`; the final state carries no gradient.

    Raises InputError for an initial state, which mamba-ssm's scan cannot start from, for fp64 and for more than 256
    states.
    """
    _check(x, A.shape[1])
    if initial is not None:
        raise InputError("backend: mamba_ssm's selective scan takes no initial state; use backend triton to continue")
    if x.shape[1] == 0:
        return torch.empty_like(x), x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x_, dt_, B_, C_, z_ = (t.to(x.dtype).transpose(1, 2).contiguous() for t in (x, dt, B, C, z))
    out, final = selective_scan_fn(
        x_, dt_, A.float(), B_, C_, D.float(), z_, dt_bias.float(), delta_softplus=True, return_last_state=True
    )
    return out.transpose(1, 2), final.detach().float()


def ssd(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.ssd`. Raises InputError for fp64 and for more than 256 states."""
    _check(x, B.shape[3])
    if x.shape[1] == 0:
        empty = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
        return torch.empty_like(x), empty if initial is None else initial.float()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    out, final = mamba_chunk_scan_combined(
        x, dt, A, B.to(x.dtype), C.to(x.dtype), chunk_size, D=D, dt_bias=dt_bias, initial_states=initial,
        dt_softplus=True, return_final_states=True,
    )  # fmt: skip
    return out, final.float()
