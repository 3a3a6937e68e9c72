"""Scores + k + protected positions -> ascending kept positions. Ties, order and protection live here only."""

from __future__ import annotations

import torch
from torch import Tensor


def protected_count(k: int, protect_recent: float) -> int:
    """How many of the newest tokens are kept whatever their score: the boundary, and the share asked for."""
    return min(k, max(1, int(protect_recent * k + 1e-9)))  # 0.29 of 100 is 28.999999999999996 in floating point


def _protected_scores(scores: Tensor, k: int, protect_recent: float) -> Tensor:
    """Scores in which protected tokens win against everything and NaN loses against everything.

    Raises ValueError unless 1 <= k <= L.
    """
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot keep {k} of {scores.shape[1]} tokens")
    scores = torch.nan_to_num(scores.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    newest = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - protected_count(k, protect_recent)
    return torch.where(newest, torch.inf, scores)


def select_index(scores: Tensor, k: int, protect_recent: float = 0.0) -> Tensor:
    """Indices (B, k), ascending, of the k highest of ``scores`` (B, L); ties go to the later position.

    The last token, the boundary, is always among them, and so is the newest ``protect_recent`` share of the kept set.
    """
    backwards = _protected_scores(scores, k, protect_recent).flip(1)
    order = torch.sort(backwards, dim=1, descending=True, stable=True).indices[:, :k]
    return (scores.shape[1] - 1 - order).sort(dim=1).values


def select_mask(scores: Tensor, k: int, protect_recent: float = 0.0) -> Tensor:
    """The same selection as booleans (B, L), by counting for each token those that beat it: O(L^2), an oracle."""
    scores = _protected_scores(scores, k, protect_recent)
    position = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    beaten = (other > mine) | ((other == mine) & (position[None, :] > position[:, None]))
    return beaten.sum(-1) < k
