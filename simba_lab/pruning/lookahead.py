"""Impact on the boundary in the layer that will look, foretold from the residual stream of a lower one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.pruning.criteria import CRITERIA, Criterion, check_reduce, impact_flops, impact_on_boundary
from simba_lab.pruning.depth import checked_depth, layer_at
from simba_lab.pruning.signals import ScoredShape, Signals


@CRITERIA.register("lookahead_impact")
class LookaheadImpact(Criterion):
    """``global_impact`` as a later layer would compute it from the residual stream of now.

    The idea: a model looks a fact up in one layer, and what the boundary reads in the layers below it, where pruning
    must begin if it is to save anything, says nothing of facts. But the stream changes little from layer to layer, so
    that the later layer's norm, projections and convolution, applied to the stream as it is, already tell which tokens
    its boundary will read. From ``layer`` on it is ``global_impact``.

    Args:
        layer: the layer that looks, an index of 1 or more, or a share of the depth in (0, 1).
        spread: so many tokens on either side share a token's score if theirs is lower: a fact is more than its answer.
        reduce: over channels, as in ``global_impact``.
    """

    def __init__(self, layer: float = 0.6, spread: int = 0, reduce: str = "absmax") -> None:
        if isinstance(spread, bool) or not isinstance(spread, int) or spread < 0:
            raise InputError(f"criterion lookahead_impact: spread must be an integer of at least 0, got {spread!r}")
        self.layer = checked_depth("criterion lookahead_impact", "layer", layer)
        self.spread, self.reduce = spread, check_reduce("lookahead_impact", reduce)

    def score(self, signals: Signals) -> Tensor:
        ahead = signals.ahead
        if ahead is None:
            raise InputError("criterion lookahead_impact: only a model's own layers can be looked ahead to")
        target = layer_at(self.layer, ahead.n_layers)
        if target >= ahead.n_layers:
            raise InputError(f"criterion lookahead_impact: layer {target} is none of {ahead.n_layers}")
        read = signals if signals.layer >= target else ahead.signals(target, signals.hidden)
        scores = impact_on_boundary(read, read.C[:, -1], None, self.reduce)
        if self.spread:
            scores = F.max_pool1d(scores[:, None], 2 * self.spread + 1, 1, self.spread)[:, 0]
        return scores

    def flops(self, shape: ScoredShape) -> int:
        """The later layer up to its scan, the impact, and the comparisons of ``spread``; in every layer alike.

        In Mamba-2 bias and softplus of the steps too, which there are operations of their own.
        """
        shared = 2 * (self.spread + 1) * shape.n_tokens if self.spread else 0
        steps = 0 if shape.n_heads is None else 2 * shape.n_heads * shape.n_tokens
        return shape.ahead + impact_flops(shape, False, self.reduce) + shared + steps
