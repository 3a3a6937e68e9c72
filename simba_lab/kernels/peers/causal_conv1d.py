"""The backend ``causal_conv1d``: the convolution of the package causal-conv1d, every other op ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simba_lab.errors import InputError

WIDTHS = (2, 3, 4)
MULTIPLE = 8
"""With channels side by side in memory, their number and the distances between tokens and sequences must divide."""


def __getattr__(op: str) -> Callable:
    """Every other op is that of the backend ``triton``."""
    from simba_lab.kernels import gpu

    return getattr(gpu, op)


def _check(x: Tensor, width: int) -> None:
    if x.dtype == torch.float64:
        raise InputError("backend: causal_conv1d computes in fp32; use backend reference for fp64")
    if width not in WIDTHS:
        raise InputError(f"d_conv: the causal_conv1d backend takes 2, 3 or 4, not {width}; use another backend")
    if x.shape[2] % MULTIPLE:
        raise InputError(
            f"backend: causal_conv1d takes a multiple of {MULTIPLE} channels, not {x.shape[2]}; use backend triton"
        )


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.causal_conv`.

    Raises InputError for fp64, widths other than 2 to 4 and a number of channels that is no multiple of 8.
    """
    _check(x, weight.shape[1])
    before = weight.shape[1] - 1
    if initial is None:
        initial = x.new_zeros(x.shape[0], before, x.shape[2])
    initial = initial.to(x.dtype)
    last = torch.cat([initial, x[:, max(0, x.shape[1] - before) :]], dim=1)[:, -before:]
    if x.shape[1] == 0:
        return torch.empty_like(x), last
    if x.stride(2) != 1 or x.stride(0) % MULTIPLE or x.stride(1) % MULTIPLE or x.data_ptr() % 16:
        x = x.contiguous()
    from causal_conv1d import causal_conv1d_fn

    out = causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, initial_states=initial.contiguous().transpose(1, 2), activation="silu"
    )
    return out.transpose(1, 2), last
