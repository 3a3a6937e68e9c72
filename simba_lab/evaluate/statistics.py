"""Paired statistics over one set of evaluation windows: intervals, permutation p-values, Holm's correction.

Every arm is measured on the same windows, so an arm is compared with another window by window: what all arms find hard
cancels. A window brings two numbers, the sum of the NLL over its scored tokens (nats) and how many tokens were scored;
the quality is the ratio of their totals. On the plain face each window scores equally many tokens; on the far face the
number varies and may be zero, which is why numerator and denominator are always resampled together.

Windows cut from one document are not independent. Where `clusters` says which document each window came from, whole
documents are resampled and whole documents have their sign flipped; the window count then says nothing about the
precision, the document count does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simba_lab.errors import InputError

FloatArray = NDArray[np.float64]
Interval = tuple[float, float]

# Resamples held in memory at once: 1000 x 1000 windows in fp64 is 8 MB, and faster than one large block.
_BATCH = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean in nats/token with its bootstrap interval; None where the windows cannot say."""

    mean: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Comparison:
    """`arm - reference` in nats/token: negative means that the arm predicts better.

    All three are None when nothing was scored. With a single window (or document) the difference is known, its interval
    and p-value are not. No field is ever NaN.
    """

    difference: float | None
    interval: Interval | None
    p_value: float | None


def paired_comparison(
    arm: FloatArray,
    reference: FloatArray,
    weights: FloatArray | None = None,
    clusters: NDArray[np.int64] | None = None,
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Comparison:
    """Compare two arms measured on the same W windows.

    Args:
        arm, reference: (W,) summed NLL of each window's scored tokens, nats.
        weights: (W,) scored tokens of each window, the same for both arms; None: one each (the values are means).
        clusters: (W,) integer naming each window's document; None: every window is independent.
        n_resamples: draws for the interval and for the p-value. The p-value is exact when all sign flips are no more.
        confidence: two-sided level of the interval.
        rng: the only source of randomness; two comparisons given equal generators draw the same resamples.

    The interval is the percentile bootstrap with its level widened for the number of clusters (see `_widened`). The
    p-value is two-sided, from flipping the sign of each cluster's paired difference; it is not corrected, see `holm`.

    Raises:
        InputError: arrays of unequal length, a negative weight, or a value that is not finite (a diverged arm).
    """
    _check(arm=arm, reference=reference)
    total, tokens = _per_cluster(np.subtract(arm, reference, dtype=np.float64), weights, clusters)
    if tokens.size == 0:
        return Comparison(None, None, None)
    difference = float(total.sum() / tokens.sum())
    if not total.any():
        return Comparison(0.0, (0.0, 0.0) if tokens.size > 1 else None, 1.0)
    if tokens.size == 1:
        return Comparison(difference, None, None)
    interval = _ratio_interval(total, tokens, n_resamples, confidence, rng)
    return Comparison(difference, interval, _sign_flip_p_value(total, n_resamples, rng))


def compare_all(
    arms: Mapping[str, FloatArray],
    reference: str,
    weights: FloatArray | None = None,
    clusters: NDArray[np.int64] | None = None,
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compare every other arm with `reference`; p-values are Holm-corrected over exactly these comparisons.

    `arms` maps a name to its (W,) summed NLL. All comparisons draw the same resamples from `seed`, so the raw
    numbers of one arm do not depend on which others were run. The reference itself is not in the result.

    Raises:
        InputError: `reference` is not one of the arms, or as `paired_comparison`, naming the arm.
    """
    if reference not in arms:
        raise InputError(f"reference arm {reference!r} is not among the arms: {', '.join(arms)}")
    _check(**arms)
    options: dict[str, Any] = {"n_resamples": n_resamples, "confidence": confidence}
    raw = {
        name: paired_comparison(values, arms[reference], weights, clusters, rng=np.random.default_rng(seed), **options)
        for name, values in arms.items()
        if name != reference
    }
    corrected = holm([comparison.p_value for comparison in raw.values()])
    return {
        name: replace(comparison, p_value=p_value)
        for (name, comparison), p_value in zip(raw.items(), corrected, strict=True)
    }


def mean_interval(
    values: FloatArray,
    weights: FloatArray | None = None,
    clusters: NDArray[np.int64] | None = None,
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    rng: np.random.Generator,
) -> Estimate:
    """The mean of one arm, `sum(values) / sum(weights)`, with its interval; arguments as in `paired_comparison`.

    This interval says how well the windows pin down the arm's own quality. It is no test between arms: two of them may
    overlap widely while the paired difference is clear of zero.
    """
    _check(values=values)
    total, tokens = _per_cluster(np.asarray(values, dtype=np.float64), weights, clusters)
    if tokens.size == 0:
        return Estimate(None, None)
    mean = float(total.sum() / tokens.sum())
    if tokens.size == 1:
        return Estimate(mean, None)
    return Estimate(mean, _ratio_interval(total, tokens, n_resamples, confidence, rng))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979), in the order given.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on; a corrected value is never below the
    one before it and never above 1. None (no test was possible) stays None and does not count towards m.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    floor = 0.0
    for rank, (p, index) in enumerate(tested):
        floor = max(floor, min(1.0, p * (len(tested) - rank)))
        corrected[index] = floor
    return corrected


def _check(**named: FloatArray) -> None:
    lengths = {name: np.shape(values) for name, values in named.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"arms must be measured on the same windows, got {lengths}")
    for name, values in named.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise InputError(f"{name}: NLL of window {bad[0]} is {values[bad[0]]}, it must be a finite number of nats")


def _per_cluster(
    values: FloatArray, weights: FloatArray | None, clusters: NDArray[np.int64] | None
) -> tuple[FloatArray, FloatArray]:
    """(C,) sums of values and of weights over each cluster; clusters that score no token are left out."""
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != values.shape or not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(f"weights must be {values.shape[0]} finite numbers of scored tokens, none below 0")
    if clusters is not None:
        if np.shape(clusters) != values.shape:
            raise InputError(f"clusters must name the document of each of the {values.shape[0]} windows")
        _, member = np.unique(clusters, return_inverse=True)
        values, weights = np.bincount(member, values), np.bincount(member, weights)
    scored = weights > 0
    return values[scored], weights[scored]


def _ratio(total: FloatArray, tokens: FloatArray, axis: int) -> FloatArray:
    return total.sum(axis=axis) / tokens.sum(axis=axis)


def _ratio_interval(
    total: FloatArray, tokens: FloatArray, n_resamples: int, confidence: float, rng: np.random.Generator
) -> Interval:
    from scipy.stats import bootstrap

    result = bootstrap(
        (total, tokens),
        _ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=_widened(confidence, tokens),
        n_resamples=n_resamples,
        batch=_BATCH,
        rng=rng,
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _widened(confidence: float, tokens: FloatArray) -> float:
    """The nominal level at which a percentile interval of few clusters covers about as often as `confidence` promises.

    Resampling n values underestimates their variance by (n - 1) / n and knows no Student t. Hesterberg (The American
    Statistician 69, 2015) therefore takes the quantiles at Phi(-sqrt(n / (n - 1)) t_{n-1}). Documents of unequal length
    count as the n = (sum of tokens)^2 / sum of tokens^2 equal ones (Kish). For hundreds of clusters nothing changes.
    """
    from scipy.stats import norm, t

    n_equal = tokens.sum() ** 2 / np.square(tokens).sum()
    quantile = t.ppf((1 + confidence) / 2, n_equal - 1) * np.sqrt(n_equal / (n_equal - 1))
    return float(1 - 2 * norm.cdf(-quantile))


def _sign_flip_p_value(total: FloatArray, n_resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p of the paired differences' sum under random signs.

    The token counts are the same under every flip, so the sum orders the flips just as the ratio would. All flips are
    enumerated when there are no more than `n_resamples`; otherwise they are drawn through `monte_carlo_test`, which
    takes the signs as one array (`permutation_test` permutes pair by pair, some ten times slower, to the same end).
    """
    from scipy.stats import monte_carlo_test, permutation_test

    if 2**total.size <= n_resamples:
        result = permutation_test(
            (total,), np.sum, permutation_type="samples", vectorized=True, n_resamples=n_resamples, batch=_BATCH
        )
        return float(result.pvalue)

    def flipped(size: tuple[int, ...]) -> FloatArray:
        return total * (1 - 2 * rng.integers(0, 2, size=size, dtype=np.int8))

    result = monte_carlo_test(total, flipped, np.sum, vectorized=True, n_resamples=n_resamples, batch=_BATCH)
    return float(result.pvalue)
