"""Moving the tokens that go on to the next layer, on CPUs: whole rows at a time, not number by number."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_tokens(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_tokens`."""
    batch, length, _ = hidden.shape
    after = torch.arange(present, length, device=chosen.device).expand(batch, length - present)
    first = length * torch.arange(batch, device=chosen.device)[:, None]
    index = (torch.cat([chosen, after], dim=1) + first).flatten()
    return _rows(hidden, index), _rows(residual, index)


def _rows(stream: Tensor, index: Tensor) -> Tensor:
    batch, _, channels = stream.shape
    return stream.reshape(-1, channels).index_select(0, index).view(batch, -1, channels)
