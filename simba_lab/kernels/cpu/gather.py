"""Choosing the tokens that go on to the next layer, and moving them, on CPUs: no full sort, whole rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import reference


def select_tokens(scores: Tensor, k: int, protected: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.select_tokens`.

    The k-th highest score is a threshold; of the tokens that equal it the latest fill what those above leave free.
    """
    if scores.is_meta:  # where nothing can be counted
        return reference.select_tokens(scores, k, protected, positions)
    ranked = reference.protected_scores(scores, protected)
    threshold = ranked.kthvalue(ranked.shape[1] - k + 1, dim=1, keepdim=True).values
    above, equal = ranked > threshold, ranked == threshold
    free = k - above.sum(1, keepdim=True)
    later = equal.sum(1, keepdim=True) - equal.cumsum(1)  # equals that come later
    kept = above | (equal & (later < free))
    # Each kept token writes its position to its place among them, every other one to a place behind the last.
    place = torch.where(kept, kept.cumsum(1) - 1, k)
    tokens = torch.arange(ranked.shape[1], device=ranked.device).expand_as(place)
    chosen = torch.zeros(len(ranked), k + 1, dtype=torch.int64, device=ranked.device).scatter_(1, place, tokens)[:, :k]
    return chosen, chosen if positions is None else positions.gather(1, chosen)


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
