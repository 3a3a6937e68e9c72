"""Scores + k + protected positions -> ascending kept positions. How many are protected, and the oracle by mask."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels import Backend, reference


def protected_count(k: int, protect_recent: float) -> int:
    """How many of the newest tokens are kept whatever their score: the boundary, and the share asked for."""
    return min(k, max(1, int(protect_recent * k + 1e-9)))  # 0.29 of 100 is 28.999999999999996 in floating point


def _check_count(scores: Tensor, k: int) -> None:
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"cannot keep {k} of {scores.shape[1]} tokens")


def select_index(scores: Tensor, k: int, protect_recent: float = 0.0) -> Tensor:
    """Indices (B, k), ascending, of the k highest of ``scores`` (B, L); ties go to the later position.

    The last token, the boundary, is always among them, and so is the newest ``protect_recent`` share of the kept set.
    Raises ValueError unless 1 <= k <= L.
    """
    _check_count(scores, k)
    return reference.select_tokens(scores, k, protected_count(k, protect_recent))[0]


def select_tokens(
    backend: Backend, scores: Tensor, positions: Tensor, k: int, protect_recent: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The same by a backend's kernel: the indices, and the original ``positions`` (B, L) of the tokens they name."""
    _check_count(scores, k)
    return backend.select_tokens(scores, k, protected_count(k, protect_recent), positions)


def select_mask(scores: Tensor, k: int, protect_recent: float = 0.0) -> Tensor:
    """The same selection as booleans (B, L), by counting for each token those that beat it: O(L^2), an oracle."""
    _check_count(scores, k)
    scores = reference.protected_scores(scores, protected_count(k, protect_recent))
    position = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    beaten = (other > mine) | ((other == mine) & (position[None, :] > position[:, None]))
    return beaten.sum(-1) < k
