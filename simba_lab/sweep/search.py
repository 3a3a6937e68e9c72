"""The search for a keep curve: TPE over knots, every suggestion projected onto the budget before it is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.budget import Budget, PrunedArm, solve
from simba_lab.checkpoint import SPEC_FILE, WEIGHTS_FILE
from simba_lab.data import EvalWindows
from simba_lab.evaluate.windows import far_face, plain_face, score_windows
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, PruningPlan, build_schedule
from simba_lab.sweep.config import SweepConfig
from simba_lab.sweep.plan import PlannedArm, SweepPlan
from simba_lab.sweep.progress import SweepProgress
from simba_lab.sweep.store import digest
from simba_lab.sweep.study import open_study, search_curves, trial_rows
from simba_lab.training import Experiment

if TYPE_CHECKING:
    from optuna.trial import Trial

ARM_NAME = "searched"


def check_search(config: SweepConfig, base: Experiment, budget: Budget) -> None:
    """Raises InputError for an unknown criterion, BudgetMismatch if the curves to begin with cannot meet the budget."""
    for drops in anchor_drops(config.search.n_values, config.search.lowest):
        _arm_at(drops, config, base, budget)


def _arm_at(drops: Sequence[float], config: SweepConfig, base: Experiment, budget: Budget) -> PrunedArm:
    """The curve with these ratios between its heights, bent to cost the budget."""
    schedule = {"class_path": "knots", "init_args": {"values": curve_values(drops)}}
    pruning = PruningPlan(CRITERIA.build(config.search.criterion), build_schedule(schedule))
    return solve(PrunedArm(ARM_NAME, base.model.config, config.n_context, config.n_suffix, pruning), budget).arm


def search_best_curve(
    folder: Path, config: SweepConfig, plan: SweepPlan, base: Experiment, weights: LanguageModel,
    windows: EvalWindows, say: Callable[[str], None],
) -> tuple[dict[str, Any], PlannedArm]:  # fmt: skip
    """Best ``knots`` curve at the plan's budget on ``windows``: a record for results.json, and the arm."""
    settings = config.search
    names = [f"drop_{i}" for i in range(settings.n_values)]

    def arm_at(point: dict[str, float]) -> PrunedArm:
        return _arm_at([point[name] for name in names], config, base, plan.budget)

    def measure(point: dict[str, float], trial: Trial) -> float:
        arm = arm_at(point)
        progress.start(f"trial {trial.number}")
        scores = score_windows(
            weights.with_pruning(arm.plan), windows, config.batch_size, progress=progress.windows_done
        )
        quality, far = plain_face(scores.nll).mean, far_face(scores.nll, windows, plan.reach).mean
        progress.finish(f"trial {trial.number}", quality, far, scores.seconds)
        trial.set_user_attr("knots", list(arm.plan.schedule.values))
        trial.set_user_attr("keep_counts", arm.keep_counts)
        trial.set_user_attr("flops", scores.flops)
        trial.set_constraint("flops", abs(plan.budget.distance(scores.flops)) - plan.budget.tolerance)
        return quality if settings.objective == "quality" else far

    key = _study_key(config, plan, base, windows)
    study = open_study(folder, f"search-{key[:12]}")
    with SweepProgress(settings.trials * len(windows), say) as progress:
        progress.skip("earlier trials", len(windows) * sum(row["value"] is not None for row in trial_rows(study)))
        anchors = [dict(zip(names, drops, strict=True)) for drops in anchor_drops(settings.n_values, settings.lowest)]
        best = search_curves(study, anchors, names, settings.lowest, settings.trials, settings.seed, measure)
    record = {"trials": trial_rows(study), "best": best.number, "split": settings.split, "windows": len(windows)}
    return record, PlannedArm(ARM_NAME, "pruned", arm_at(best.params), base)


def _study_key(config: SweepConfig, plan: SweepPlan, base: Experiment, windows: EvalWindows) -> str:
    """Changes with whatever decides a trial's value or a suggestion; more trials go on in the same study."""
    settings = {key: value for key, value in config.to_dict()["search"].items() if key != "trials"}
    sizes = (plan.budget.flops, plan.budget.tolerance, config.n_context, config.n_suffix)
    return digest(settings, sizes, windows.tokens.numpy(), base.folder / SPEC_FILE, base.folder / WEIGHTS_FILE)


def curve_values(drops: Sequence[float]) -> list[float]:
    """Heights of a falling curve from the ratio of each height to the one before it."""
    return list(accumulate(drops, mul))


def anchor_drops(n_values: int, lowest: float) -> list[list[float]]:
    """Ratios that draw the linear line to 10 %, a geometric fall to 10 %, and one early drop (uniform)."""
    line = [1.0, *(1 - 0.9 * (i + 1) / n_values for i in range(n_values))]
    linear = [after / before for before, after in zip(line, line[1:], strict=False)]
    geometric = [0.1 ** (1 / n_values)] * n_values
    uniform = [0.5] + [1.0] * (n_values - 1)
    return [[min(1.0, max(lowest, ratio)) for ratio in ratios] for ratios in (linear, geometric, uniform)]
