"""Choosing the tokens that go on to the next layer, and moving them, on CPUs: whole rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference
from simba_lab.kernels.cpu.arrays import as_array, computable
from simba_lab.kernels.cpu.threads import use_torch_threads


def select_tokens(scores: Tensor, k: int, protected: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.select_tokens`."""
    if scores.is_meta:  # where nothing can be counted
        return reference.select_tokens(scores, k, protected, positions)
    from simba_lab.kernels.cpu import select

    use_torch_threads()
    if positions is None:
        positions = torch.arange(scores.shape[1]).expand(scores.shape)
    chosen, kept = torch.empty(2, len(scores), k, dtype=torch.int64).unbind()
    ranked, places = as_array(computable(scores)), as_array(positions)
    select.select(ranked, protected, places, chosen.numpy(), kept.numpy())
    return chosen, kept


def keep_tokens(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.keep_tokens`."""
    index = kept_rows(hidden.shape, chosen, present).flatten()
    return _rows(hidden, index), _rows(residual, index)


def kept_rows(shape: torch.Size, chosen: Tensor, present: int) -> Tensor:
    """Rows (B, k + L - present) int64 of the kept tokens among those of all sequences of a stream (B, L, D)."""
    batch, length, _ = shape
    after = torch.arange(present, length, device=chosen.device).expand(batch, length - present)
    first = length * torch.arange(batch, device=chosen.device)[:, None]
    return torch.cat([chosen, after], dim=1) + first


def _rows(stream: Tensor, index: Tensor) -> Tensor:
    batch, _, channels = stream.shape
    return stream.reshape(-1, channels).index_select(0, index).view(batch, -1, channels)
