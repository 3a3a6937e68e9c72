"""Impact on the boundary in the layer that will look, foretold from the residual stream of a lower one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.pruning.criteria import CRITERIA, Criterion, check_reduce, impact_flops, impact_on_boundary
from simba_lab.pruning.depth import checked_depth, layer_at
from simba_lab.pruning.signals import ScoredShape, Signals

_OWNER = "criterion lookahead_impact"


@CRITERIA.register("lookahead_impact")
class LookaheadImpact(Criterion):
    """``global_impact`` as a later layer would compute it from the residual stream of now.

    The idea: a model looks a fact up in one layer, and what the boundary reads in the layers below it, where pruning
    must begin if it is to save anything, says nothing of facts. But the stream changes little from layer to layer, so
    that the later layer's norm, projections and convolution, applied to the stream as it is, already tell which tokens
    its boundary will read. From ``layer`` on it is ``global_impact``.

    Args:
        layer: the layer that looks, an index of 1 or more, or a share of the depth in (0, 1); or several of them. Then
            a token counts as in the layer that ranks it highest, for scores of two layers have no common scale.
        before, after: so many tokens before and after a token share its score if theirs is lower: what is read in one
            place was said in those before it.
        reduce: over channels, as in ``global_impact``; a fact is spread over many.
        skip_protected: leave unread what is kept in any case, the boundary's own query apart. Its steps, through which
            all before it decays, are taken to be the mean of the others'. Saves the share that is protected.
    """

    def __init__(
        self, layer: float | Sequence[float] = 0.6, before: int = 0, after: int = 0, reduce: str = "l2",
        skip_protected: bool = False,
    ) -> None:  # fmt: skip
        self.layer = layer
        self._layers = [checked_depth(_OWNER, "layer", one) for one in _several(layer)]
        self.before, self.after = _count("before", before), _count("after", after)
        self.reduce = check_reduce("lookahead_impact", reduce)
        if not isinstance(skip_protected, bool):
            raise InputError(f"{_OWNER}: skip_protected must be true or false, got {skip_protected!r}")
        self.skip_protected = skip_protected

    def score(self, signals: Signals) -> Tensor:
        """Scores (B, k); 0 of tokens that were not read."""
        scores = [self._scores(signals, target) for target in self._targets(signals)]
        read = scores[0] if len(scores) == 1 else torch.stack([_ranks(one) for one in scores]).amax(0).to(torch.float32)
        unread = read.new_zeros(len(read), signals.positions.shape[1] - read.shape[1])
        return torch.cat([read, unread], 1)

    def _targets(self, signals: Signals) -> list[int]:
        """The layers to read as, ascending, the current one in the place of all below it."""
        if signals.ahead is None:
            raise InputError(f"{_OWNER}: only a model's own layers can be looked ahead to")
        return sorted({max(target, signals.layer) for target in self._named(signals.ahead.n_layers)})

    def _named(self, n_layers: int) -> set[int]:
        """The layers that look, in a model of so many. Raises InputError for one that it lacks."""
        targets = {layer_at(layer, n_layers) for layer in self._layers}
        if max(targets) >= n_layers:
            raise InputError(f"{_OWNER}: layer {max(targets)} is none of {n_layers}")
        return targets

    def _scores(self, signals: Signals, target: int) -> Tensor:
        """Of the tokens that are read, which are the oldest, as the layer ``target`` would score them."""
        if self.skip_protected and signals.n_free is not None:
            scores = self._scores_of_free(signals, target)
        else:
            read = signals if signals.layer == target else signals.ahead.signals(target, signals.hidden)
            scores = impact_on_boundary(read, read.C[:, -1], None, self.reduce)
        if self.before or self.after:
            padded = F.pad(scores[:, None], (self.after, self.before), value=-math.inf)
            scores = F.max_pool1d(padded, self.before + self.after + 1, 1)[:, 0]
        return scores

    def _scores_of_free(self, signals: Signals, target: int) -> Tensor:
        """The same of the free tokens alone, which one token follows in the place of all that are protected."""
        n_free, present = signals.n_free, signals.positions.shape[1]
        if signals.layer == target:
            read, query = signals, signals.C[:, -1]
        else:
            free, last = slice(n_free), slice(-signals.ahead.reach, None)
            read = signals.ahead.signals(target, signals.hidden[:, free], free)
            query = signals.ahead.signals(target, signals.hidden[:, last], last).C[:, -1]
        read = read.changed(x=read.x[:, :n_free], dt=read.dt[:, :n_free], B=read.B[:, :n_free])
        # In fp64, so that the mean of a sequence is the same in any batch.
        step = (present - n_free) * read.delta.mean(1, keepdim=True, dtype=torch.float64)
        dt = step + torch.log(-torch.expm1(-step)) - read.dt_bias  # of which softplus makes that step
        dt = dt.clamp(max=torch.finfo(read.dt.dtype).max).to(read.dt.dtype)
        followed = read.changed(x=_and_last(read.x), dt=torch.cat([read.dt, dt], 1), B=_and_last(read.B))
        return impact_on_boundary(followed, query, None, self.reduce)[:, :-1]

    def flops(self, shape: ScoredShape) -> int:
        """Of every layer that looks, all up to its scan, the impact and the comparisons of neighbours; in all alike.

        In Mamba-2 bias and softplus of the steps too, which there are operations of their own. Of several layers also
        the comparisons that rank tokens, twice for a rank of each, and those between layers. Raises InputError for a
        layer that the model lacks, so that a plan does.
        """
        if shape.n_layers is not None:
            self._named(shape.n_layers)
        skips = self.skip_protected and shape.n_free is not None
        scored = shape.n_free if skips else shape.n_tokens
        neighbours, several = self.before + self.after, len(self._layers) > 1
        shared = (neighbours + 2) * scored if neighbours else 0
        ranking = scored * (2 * math.ceil(math.log2(max(2, scored))) + 1) if several else 0
        return len(self._layers) * (self._reading(shape, skips) + shared + ranking)

    def _reading(self, shape: ScoredShape, skips: bool) -> int:
        """FLOPs of one layer's reading and impact."""
        steps = 0 if shape.n_heads is None else 2 * shape.n_heads
        if not skips:
            return shape.n_tokens * (shape.ahead + steps) + impact_flops(shape, False, self.reduce)
        read, query = shape.n_free, min(shape.reach, shape.n_tokens)
        impact = impact_flops(dataclasses.replace(shape, n_tokens=read + 1), False, self.reduce)
        return (read + query) * shape.ahead + (read + 1) * steps + impact + (3 * read + 8) * shape.n_steps


def _several(layer: float | Sequence[float]) -> list[float]:
    layers = list(layer) if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]
    if not layers:
        raise InputError(f"{_OWNER}: layer must name at least one layer")
    return layers


def _and_last(tokens: Tensor) -> Tensor:
    """(B, k, ...) with the last token once more."""
    return torch.cat([tokens, tokens[:, -1:]], 1)


def _ranks(scores: Tensor) -> Tensor:
    """Place of every token (B, L) in its sequence, 0 for the lowest score; of equals the later one is higher."""
    return scores.argsort(dim=1, stable=True).argsort(dim=1)


def _count(key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{_OWNER}: {key} must be an integer of at least 0, got {value!r}")
    return value
