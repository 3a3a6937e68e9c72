"""How alike the tokens of one residual stream are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def neighbour_similarity(stream: Tensor) -> float | None:
    """Mean cosine of the vectors (k, M) of tokens next to each other, over k - 1 pairs; None for one token."""
    if len(stream) < 2:
        return None
    unit = F.normalize(stream.double(), dim=-1)
    return float((unit[1:] * unit[:-1]).sum(-1).mean())


def any_pair_similarity(stream: Tensor) -> float | None:
    """Mean cosine over all k (k - 1) / 2 pairs: what neighbours must exceed to be alike *because* they are neighbours.

    |sum of unit vectors|^2 counts every pair twice and every token once with itself, so that no pair is formed.
    """
    count = len(stream)
    if count < 2:
        return None
    unit = F.normalize(stream.double(), dim=-1)
    with_self = unit.square().sum()
    return float((unit.sum(0).square().sum() - with_self) / (count * (count - 1)))
