"""Tensors as the arrays that the CPU kernels read: flat, in a dtype they know, copied only where they must be."""

from __future__ import annotations

import torch
from torch import Tensor

_COMPUTE = {torch.float32: torch.float32, torch.float64: torch.float64}


def computable(t: Tensor) -> Tensor:
    """fp32 for half precision; fp32 and fp64 stay."""
    return t.to(_COMPUTE.get(t.dtype, torch.float32))


def _strided(t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Flat view over the memory of (B, L, D) with contiguous channels, and its strides (batch, token)."""
    if t.stride(2) != 1 or t.numel() == 0:
        t = t.contiguous()
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    return t.as_strided((span if t.numel() else 0,), (1,)), (t.stride(0), t.stride(1))


def flat_views(*tensors: Tensor):  # noqa: ANN201 - (list of arrays, int64 array of strides)
    """Tensors (B, L, D) as flat arrays, and the strides (batch, token) of each."""
    import numpy as np

    views = [_strided(t.detach()) for t in tensors]
    return [flat.numpy() for flat, _ in views], np.array([strides for _, strides in views], np.int64)


def as_array(t: Tensor):  # noqa: ANN201 - numpy array
    """The memory of a tensor, or of a contiguous copy."""
    return t.detach().contiguous().numpy()


def rows(t: Tensor):  # noqa: ANN201 - numpy array
    """(..., channels) as an array (tokens, channels), sharing memory where it can."""
    return t.detach().contiguous().view(-1, t.shape[-1]).numpy()
