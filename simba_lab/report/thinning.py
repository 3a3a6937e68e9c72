"""How a page of many arms stays readable and small: fewer arms in its pictures first, then in its tables.

No file is thinned: every CSV holds all arms that the page lists, results.json holds all there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from simba_lab.report.folders import Comparison, Gathered, Skipped
from simba_lab.report.results import Arm, Results

LIMIT = 3_000_000
"""Bytes of a page at most."""
MOST_DRAWN, FEWEST_DRAWN, FEWEST_LISTED = 120, 60, 30


def by_weight(results: Results) -> list[Arm]:
    """The arms, those that a page must not lack first: the first arm, both best ones, the controls, the lowest NLL."""
    conclusion = results["conclusion"]
    named = (results["arms"][0]["name"], conclusion["best"], conclusion["best_far"])

    def weight(arm: Arm) -> tuple[bool, bool, float]:
        quality = math.inf if arm["quality"] is None else arm["quality"]
        return arm["name"] not in named, arm["kind"] == "pruned", quality

    return sorted(results["arms"], key=weight)


def drawn(comparison: Comparison) -> list[Arm]:
    """The arms that pictures show, in the file's order."""
    arms = comparison.results["arms"]
    if len(arms) <= comparison.most_drawn:
        return list(arms)
    names = {arm["name"] for arm in by_weight(comparison.results)[: comparison.most_drawn]}
    return [arm for arm in arms if arm["name"] in names]


def told(comparisons: Sequence[Comparison]) -> str:
    """What a caption says of arms that are not drawn; nothing where all are."""
    shown, there = (sum(map(len, of)) for of in (map(drawn, comparisons), (c.results["arms"] for c in comparisons)))
    if shown == there:
        return ""
    return (
        f" Drawn are {shown} of {there:,} arms: the first, the best, the controls and those of the lowest NLL; the CSV "
        "has all."
    )


def versions(gathered: Gathered) -> Iterator[Gathered]:
    """The same page in ever fewer bytes.

    Pictures of at most 120 arms, then of 60, beside which stands no table of keep counts and of every arm's
    configuration only what differs from the first arm's; then ever fewer arms at all, half as many each time, which
    the page says among what it leaves out.
    """
    yield _with(gathered, MOST_DRAWN, whole=True)
    yield (lean := _with(gathered, FEWEST_DRAWN, whole=False))
    listed = 1 << (max(_counts(gathered)) - 1).bit_length()
    while (listed := listed // 2) >= FEWEST_LISTED:
        yield _listing(lean, listed)


def _counts(gathered: Gathered) -> list[int]:
    return [len(one.results["arms"]) for one in _all(gathered)]


def _all(gathered: Gathered) -> list[Comparison]:
    return gathered.comparisons + gathered.unequal


def _with(gathered: Gathered, most: int, whole: bool) -> Gathered:
    each = max(FEWEST_LISTED, most // len(_all(gathered)))
    parts = (gathered.comparisons, gathered.unequal)
    equal, unequal = ([replace(one, most_drawn=each, whole=whole) for one in part] for part in parts)
    return replace(gathered, comparisons=equal, unequal=unequal)


def _listing(gathered: Gathered, listed: int) -> Gathered:
    """At most ``listed`` arms of each sweep; what is left out is said."""
    skipped = list(gathered.skipped)
    changed: list[list[Comparison]] = []
    for comparisons in (gathered.comparisons, gathered.unequal):
        changed.append([])
        for one in comparisons:
            names = {arm["name"] for arm in by_weight(one.results)[:listed]}
            kept = [arm for arm in one.results["arms"] if arm["name"] in names]
            if gone := len(one.results["arms"]) - len(kept):
                skipped.append(Skipped(one.name, _why_unlisted(gone, len(one.results["arms"]))))
            changed[-1].append(replace(one, results={**one.results, "arms": kept}))
    return Gathered(*changed, skipped)


def _why_unlisted(gone: int, there: int) -> str:
    return (
        f"{gone:,} of its {there:,} arms, those with the highest NLL that are no controls, so that this page stays "
        f"under {LIMIT // 10**6} MB; its results.json holds them all"
    )
