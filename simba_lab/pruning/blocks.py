"""A criterion that ranks whole blocks of neighbouring tokens by what any other criterion says of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.pruning.criteria import CRITERIA, Criterion, checked_scores
from simba_lab.pruning.signals import ScoredShape, Signals

if TYPE_CHECKING:
    from simba_lab.registry import Spec

POOLS = ("mean", "max")


@CRITERIA.register("blocks")
class Blocks(Criterion):
    """The score of a block of ``size`` neighbouring tokens, for each of them: the ``mean`` or ``max`` of another's.

    The idea: every layer reads a token through a convolution over its neighbours. A token that goes on without them is
    convolved with strangers in all layers above, and that can cost more than losing it. Blocks are counted back from
    the boundary in the whole context, so that they stay the same from layer to layer; of a block that is cut by an
    earlier layer the tokens present count. Equal scores fall to the later token, so that only the last block that
    goes on is cut.

    Args:
        criterion: scores single tokens: a name, a class path, or class_path + init_args.
        size: tokens of a block; 1 with either pool is the criterion itself.
        pool: ``mean`` or ``max`` over the block.
    """

    def __init__(self, criterion: Spec = "global_impact", size: int = 64, pool: str = "mean") -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"criterion blocks: size must be an integer of at least 1, got {size!r}")
        if pool not in POOLS:
            raise InputError(f"criterion blocks: pool must be mean or max, got {pool!r}")
        self.criterion, self.size, self.pool = criterion, size, pool
        self._of_tokens = CRITERIA.build(criterion)
        self.own_impact = self._of_tokens.own_impact

    def score(self, signals: Signals) -> Tensor:
        scores, positions = checked_scores(self._of_tokens, signals), signals.positions
        # Rises along a row, as searchsorted wants it.
        block = -((positions[:, -1:] - positions) // self.size)
        first = torch.searchsorted(block, block)
        if self.pool == "max":
            best = torch.full_like(scores, -torch.inf).scatter_reduce_(1, first, scores, "amax")
            return best.gather(1, first)
        after = torch.searchsorted(block, block, right=True)
        # fp64, so that a difference of sums over a long context is as exact as the sum over a block.
        total = scores.cumsum(1, dtype=torch.float64)
        total = torch.cat([total.new_zeros(len(total), 1), total], dim=1)
        return ((total.gather(1, after) - total.gather(1, first)) / (after - first)).to(scores.dtype)

    def flops(self, shape: ScoredShape) -> int:
        """The other criterion's, a binary search or two of log2 k steps per token, and the rest of :meth:`score`."""
        searches, rest = (1, 4) if self.pool == "max" else (2, 7)
        steps = shape.n_tokens.bit_length()
        return self._of_tokens.flops(shape) + (searches * steps + rest) * shape.n_tokens
