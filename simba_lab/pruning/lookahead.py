"""Impact on the boundary in the layer that will look, foretold from the residual stream of a lower one."""

from __future__ import annotations

import math

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
        before, after: so many tokens before and after a token share its score if theirs is lower: what is read in one
            place was said in those before it.
        reduce: over channels, as in ``global_impact``; a fact is spread over many.
    """

    def __init__(self, layer: float = 0.6, before: int = 0, after: int = 0, reduce: str = "l2") -> None:
        self.layer = checked_depth("criterion lookahead_impact", "layer", layer)
        self.before, self.after = _count("before", before), _count("after", after)
        self.reduce = check_reduce("lookahead_impact", reduce)

    def score(self, signals: Signals) -> Tensor:
        ahead = signals.ahead
        if ahead is None:
            raise InputError("criterion lookahead_impact: only a model's own layers can be looked ahead to")
        target = layer_at(self.layer, ahead.n_layers)
        if target >= ahead.n_layers:
            raise InputError(f"criterion lookahead_impact: layer {target} is none of {ahead.n_layers}")
        read = signals if signals.layer >= target else ahead.signals(target, signals.hidden)
        scores = impact_on_boundary(read, read.C[:, -1], None, self.reduce)
        if self.before or self.after:
            padded = F.pad(scores[:, None], (self.after, self.before), value=-math.inf)
            scores = F.max_pool1d(padded, self.before + self.after + 1, 1)[:, 0]
        return scores

    def flops(self, shape: ScoredShape) -> int:
        """The later layer up to its scan, the impact, and the comparisons of neighbours; in every layer alike.

        In Mamba-2 bias and softplus of the steps too, which there are operations of their own.
        """
        neighbours = self.before + self.after
        shared = (neighbours + 2) * shape.n_tokens if neighbours else 0
        steps = 0 if shape.n_heads is None else 2 * shape.n_heads * shape.n_tokens
        return shape.ahead + impact_flops(shape, False, self.reduce) + shared + steps


def _count(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"criterion lookahead_impact: {key} must be an integer of at least 0, got {value!r}")
    return value
