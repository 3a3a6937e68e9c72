"""From measured arms to ``results.json``: intervals, paired comparisons, the conclusion. Nothing is measured here."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from simba_lab.data import EvalWindows
from simba_lab.environment import command_line, describe
from simba_lab.evaluate.conclusion import best_arm, conclude
from simba_lab.evaluate.statistics import Comparison, compare_all, mean_interval
from simba_lab.evaluate.windows import Face, answered, by_distance, distance_edges, far_face, plain_face
from simba_lab.kernels.cost import CONVENTION
from simba_lab.pruning import CRITERIA, SCHEDULES
from simba_lab.sweep.config import StatisticsConfig, SweepConfig
from simba_lab.sweep.plan import PlannedArm, SweepPlan
from simba_lab.sweep.store import StoredArm

FACES = ("quality", "quality_far")
Comparisons = dict[str, Comparison]


def assemble(
    name: str, config: SweepConfig, plan: SweepPlan, stored: Sequence[StoredArm], runs: Sequence[str],
    windows: EvalWindows, search: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The content of results.json; ``stored`` and ``runs`` (folders) in the order of the plan's arms."""
    names = [arm.name for arm in plan.arms]
    faces = {
        "quality": {n: plain_face(s.nll, windows) for n, s in zip(names, stored, strict=True)},
        "quality_far": {n: far_face(s.nll, windows, plan.reach) for n, s in zip(names, stored, strict=True)},
    }
    clusters, statistics = windows.document, config.statistics
    versus_first = {face: _compare(faces[face], names[0], clusters, statistics) for face in FACES}
    rows = [
        _row(arm, kept, run, faces, versus_first, clusters, statistics)
        | {"by_distance": by_distance(kept.nll, windows, distance_edges(plan.reach, windows.n_context))}
        | ({} if windows.scored is None else {"answered": answered(kept.nll, windows)})
        for arm, kept, run in zip(plan.arms, stored, runs, strict=True)
    ]
    versus_best = {face: _versus_best(rows, face, faces[face], clusters, statistics) for face in FACES}
    results = {
        "name": name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "budget_flops": plan.budget.flops,
        "tolerance": plan.budget.tolerance,
        "budget_reference": plan.budget.reference,
        "convention": CONVENTION,
        "metric": _metric(config, plan.reach),
        "protocol": "suffix",
        "n_context": windows.n_context,
        "n_suffix": windows.n_suffix,
        "far_distance": plan.reach,
        "windows": len(windows),
        "documents": len(np.unique(clusters)),
        "far_tokens": int(faces["quality_far"][names[0]].tokens.sum()),
        "statistics": {
            "interval": f"{100 * statistics.confidence:g} % paired bootstrap over documents",
            "p_value": "two-sided sign-flip permutation over documents, Holm-corrected over the arms",
            "resamples": str(statistics.resamples),
            "seed": str(statistics.seed),
        },
        "environment": describe(),
        "config": config.to_dict(),
        "conclusion": conclude(
            rows, versus_best["quality"], versus_best["quality_far"], confidence=statistics.confidence
        ),
        "arms": rows,
    }
    return results if search is None else results | {"search": search}


def _metric(config: SweepConfig, reach: int) -> str:
    far = f"far: tokens last seen more than {reach} tokens before the end of the context"
    if config.recall is None:
        return f"suffix NLL on {config.split} text, nats per token; {far}"
    what = "passages that come back" if config.recall.form == "passage" else f"planted facts ({config.recall.form})"
    return f"NLL of the answers to {what}, {config.recall.distance} tokens back, nats per token; {far}"


def _row(
    arm: PlannedArm, kept: StoredArm, run: str, faces: dict[str, dict[str, Face]],
    versus_first: dict[str, Comparisons], clusters: np.ndarray, statistics: StatisticsConfig,
) -> dict[str, Any]:  # fmt: skip
    counts, plan = arm.arm.keep_counts, arm.plan
    row: dict[str, Any] = {
        "name": arm.name,
        "kind": arm.kind,
        "criterion": None if plan is None else CRITERIA.name_of(plan.criterion),
        "schedule": None if plan is None else SCHEDULES.name_of(plan.schedule),
        "matched": arm.matched,
        "flops": kept.flops,
        "flops_by_op": kept.record["flops_by_op"],
        "windows": len(kept.nll),
        "wall_seconds": kept.record["wall_seconds"],
        "run": run,
        "keep_counts": counts,
        "mean_keep": sum(counts) / len(counts) / counts[0],
        "final_keep": counts[-1] / counts[0],
        "spec": arm.spec(),
    }
    for face, suffix in (("quality", ""), ("quality_far", "_far")):
        values = faces[face][arm.name]
        rng = np.random.default_rng([statistics.seed, 1])
        estimate = mean_interval(
            values.nll, values.tokens, clusters, n_resamples=statistics.resamples,
            confidence=statistics.confidence, rng=rng,
        )  # fmt: skip
        comparison = versus_first[face].get(arm.name)
        row[face] = values.mean
        row[f"{face}_interval"] = _pair(estimate.interval)
        row[f"difference{suffix}"] = comparison and comparison.difference
        row[f"difference{suffix}_interval"] = _pair(comparison and comparison.interval)
        row[f"p_value{suffix}"] = comparison and comparison.p_value
    return row


def _pair(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [float(bound) for bound in interval]


def _compare(faces: dict[str, Face], reference: str, clusters: np.ndarray, settings: StatisticsConfig) -> Comparisons:
    """Every arm against ``reference``, which itself is left out."""
    tokens = next(iter(faces.values())).tokens
    return compare_all(
        {name: face.nll for name, face in faces.items()}, reference, tokens, clusters,
        n_resamples=settings.resamples, confidence=settings.confidence, seed=settings.seed,
    )  # fmt: skip


def _versus_best(
    rows: Sequence[dict[str, Any]], face: str, faces: dict[str, Face], clusters: np.ndarray, settings: StatisticsConfig
) -> Comparisons:
    best = best_arm(rows, face)
    return {} if best is None else _compare(faces, best, clusters, settings)
