"""Criteria of our own that start from the impact of a token on the boundary: other queries, weights and ranks.

Each is one call of the backend's impact op with changed inputs plus work per token, free of data-dependent shapes and
of waits for the device. ``op`` is None: what they execute beside that op is counted as a user's criterion would be,
and the closed forms here say the same without running them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import cost
from simba_lab.pruning.criteria import (
    CRITERIA,
    Criterion,
    check_reduce,
    impact_flops,
    impact_on_boundary,
    impact_on_output,
)
from simba_lab.pruning.signals import OwnImpact, ScoredShape, Signals

_OPERATIONS_PER_TOKEN = 26
"""Of banded_impact beside impact and sorts; a test counts them."""


def _positive(criterion: str, key: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"criterion {criterion}: {key} must be an integer of at least 1, got {value!r}")
    return value


@CRITERIA.register("query_impact")
class QueryImpact(Criterion):
    """Impact as the last queries read it, not only the boundary's.

    The idea: ``global_impact`` asks one question, C of the boundary, while the suffix will ask many; the newest tokens
    are the best guess at which. The score reads what each token left in the boundary's state by the mean C of the last
    ``queries`` tokens present: since reading is linear, that is exactly the mean over those q of
    ``sum_n C_q[n] exp(A sum_{t+1..b} delta) delta_t B_t[n] x_t``. It is not the mean of ``dy_q(t)``, in which nothing
    decays after q: that has a query per channel, which no shared C can express.

    Questions of opposite sign cancel in a mean. ``probes`` cuts the queries into so many runs, each read by its own
    mean, and the strongest reading counts, at the cost of one pass each. One query is ``global_impact``.
    """

    def __init__(self, queries: int = 16, probes: int = 1, reduce: str = "absmax") -> None:
        self.queries = _positive("query_impact", "queries", queries)
        self.probes = _positive("query_impact", "probes", probes)
        if probes > queries:
            raise InputError(f"criterion query_impact: probes must be at most queries, got {probes} of {queries}")
        self.reduce = check_reduce("query_impact", reduce)

    def _sizes(self, tokens: int) -> tuple[int, int]:
        """Queries and probes that ``tokens`` tokens allow."""
        queries = min(self.queries, tokens)
        return queries, min(self.probes, queries)

    def score(self, signals: Signals) -> Tensor:
        queries, probes = self._sizes(signals.C.shape[1])
        wide = torch.promote_types(signals.C.dtype, torch.float32)
        runs = signals.C[:, -queries:].tensor_split(probes, dim=1)
        best, *others = (impact_on_boundary(signals, run.mean(1, dtype=wide), None, self.reduce) for run in runs)
        for reading in others:
            best = torch.maximum(best, reading)
        return best

    def flops(self, shape: ScoredShape) -> int:
        """``m d_state`` for the means, a pass for each probe, a comparison for each beyond the first."""
        queries, probes = self._sizes(shape.n_tokens)
        means = queries * shape.n_groups * shape.d_state
        return means + probes * impact_flops(shape, False, self.reduce) + (probes - 1) * shape.n_tokens


@CRITERIA.register("output_impact")
class OutputImpact(Criterion):
    """Impact on what leaves the layer: channel d counts by the norm of the output projection's column d.

    The idea: ``global_impact`` compares channels as they are inside the layer, yet the next layer sees them only
    through ``out_proj``, and a loud channel with a short column changes nothing. With ``reduce`` l2 the score is the
    length of the token's contribution to the residual stream if columns were orthogonal; ``max`` and ``absmax`` take
    the channel that moves it furthest. ``gated`` weighs by silu(z_b[d]) too. In Mamba-2 the column is scaled by the
    weight of the norm before the projection; the norm's own division, one number per group of channels, is left out.
    """

    def __init__(self, reduce: str = "l2", gated: bool = False) -> None:
        self.reduce = check_reduce("output_impact", reduce)
        self.gated = gated

    def score(self, signals: Signals) -> Tensor:
        weight = signals.channel_norms.expand(signals.z.shape[0], -1)
        if self.gated:
            weight = weight * F.silu(signals.z[:, -1].to(weight.dtype))
        return impact_on_boundary(signals, signals.C[:, -1], weight, self.reduce)

    def flops(self, shape: ScoredShape) -> int:
        """Norms of the columns are charged to every sequence, though a batch needs them once."""
        norms = cost.vector_norm(shape.d_inner, shape.d_model)
        if shape.n_heads is not None:
            norms += 2 * shape.d_inner  # absolute weights of the norm, and the products with them
        gate = 2 * shape.d_inner if self.gated else 0
        return norms + gate + impact_flops(shape, True, self.reduce)


@CRITERIA.register("banded_impact")
class BandedImpact(Criterion):
    """The best by impact from every band of distance: recency and impact no longer compete for the same places.

    The idea: impact decays with distance, so that its ranking is mostly recency, and the few far tokens that matter
    lose to any near one. Here the context is cut into bands of doubling width, the newest of ``first`` tokens, and
    tokens are ranked by impact within their band only. Band j, which began with W_j tokens, keeps the same share of
    them as any other, times ``2^(-falloff j)``, and all of them once the share reaches one: 0 keeps the same share of
    every band, 1 the same number, and the more the closer to recency. Shares refer to the bands of the whole context,
    so that pruning again in the next layer tightens them and does not compound them.
    """

    def __init__(self, first: int = 16, falloff: float = 1.0, reduce: str = "absmax") -> None:
        self.first = _positive("banded_impact", "first", first)
        if not (isinstance(falloff, (int, float)) and 0 <= falloff <= 8):
            raise InputError(f"criterion banded_impact: falloff must lie in [0, 8], got {falloff!r}")
        self.falloff = falloff
        self.reduce = check_reduce("banded_impact", reduce)
        self.own_impact = OwnImpact(reduce)

    def score(self, signals: Signals) -> Tensor:
        impact = impact_on_output(signals, self.own_impact)
        scale = self._scale(signals.positions)
        place = places_in_runs(impact, scale).to(impact.dtype)
        return -(place + 0.5) * scale**self.falloff / self._width(signals.positions, scale)

    def _scale(self, positions: Tensor) -> Tensor:
        """2^j for tokens of band j, those at distances from ``first (2^j - 1)`` up to ``first (2^(j+1) - 1)``, fp32."""
        steps = ((positions[:, -1:] - positions) // self.first + 1).to(torch.float32)
        return steps / (2 * torch.frexp(steps).mantissa)  # exact, which a logarithm need not be

    def _width(self, positions: Tensor, scale: Tensor) -> Tensor:
        """Tokens of the band in the whole context; the oldest band ends where the context begins."""
        start, end = self.first * (scale - 1), self.first * (2 * scale - 1)
        return torch.minimum(end, positions[:, -1:] + 1) - start

    def flops(self, shape: ScoredShape) -> int:
        """Impact, two sorts as selection charges them, and the rest of :meth:`score`, integers included."""
        sorts = 2 * cost.select(shape.n_tokens)
        return impact_flops(shape, False, self.reduce) + sorts + _OPERATIONS_PER_TOKEN * shape.n_tokens


def places_in_runs(scores: Tensor, key: Tensor) -> Tensor:
    """How many tokens with the same ``key`` come before each by falling score, the later first of equals: (B, k) int64.

    ``key`` (B, k) falls or stays along a row. NaN loses against all.
    """
    tokens = scores.shape[1]
    scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    by_score = tokens - 1 - scores.flip(1).sort(dim=1, descending=True, stable=True).indices
    within = key.gather(1, by_score).sort(dim=1, descending=True, stable=True).indices
    by_run = by_score.gather(1, within)
    index = torch.arange(tokens, device=scores.device).expand_as(by_run)
    rank = torch.empty_like(by_run).scatter_(1, by_run, index)
    begins = F.pad(key[:, 1:] != key[:, :-1], (1, 0))
    return rank - (index * begins).cummax(1).values
