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
from simba_lab.training.events import Events

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

ARM_NAME, EVENTS_FOLDER = "searched", "search"


def check_search(config: SweepConfig, base: Experiment, budget: Budget) -> None:
    """Raises InputError for an unknown criterion, BudgetMismatch if the curves to begin with cannot meet the budget."""
    for drops in anchor_drops(config.search.n_values, config.search.lowest):
        _arm_at(drops, config, base, budget)


def _arm_at(drops: Sequence[float], config: SweepConfig, base: Experiment, budget: Budget) -> PrunedArm:
    """The curve with these ratios between its heights, bent to cost the budget."""
    schedule = {"class_path": "knots", "init_args": {"values": curve_values(drops)}}
    criterion, convolution = CRITERIA.build(config.search.criterion), config.search.convolution
    pruning = PruningPlan(criterion, build_schedule(schedule), convolution=convolution)
    return solve(PrunedArm(ARM_NAME, base.model.config, config.n_context, config.n_suffix, pruning), budget).arm


class CurveSearch:
    """What one trial of the search measures, and what is made of all of them."""

    def __init__(self, config: SweepConfig, plan: SweepPlan, base: Experiment) -> None:
        self.config, self.plan, self.base, self.settings = config, plan, base, config.search
        self.names = [f"drop_{i}" for i in range(self.settings.n_values)]

    @property
    def anchors(self) -> list[dict[str, float]]:
        """Points tried first."""
        drops = anchor_drops(self.settings.n_values, self.settings.lowest)
        return [dict(zip(self.names, ratios, strict=True)) for ratios in drops]

    def planned(self, point: dict[str, float]) -> PlannedArm:
        """The arm at ``point``, bent to cost the budget."""
        arm = _arm_at([point[name] for name in self.names], self.config, self.base, self.plan.budget)
        return PlannedArm(ARM_NAME, "pruned", arm, self.base)

    def measure(
        self, point: dict[str, float], weights: LanguageModel, windows: EvalWindows,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The objective as ``value``, both faces, seconds, and as ``noted`` what the trial remembers."""
        arm = self.planned(point).arm
        scores = score_windows(weights.with_pruning(arm.plan), windows, self.config.batch_size, progress=progress)
        quality, far = plain_face(scores.nll, windows).mean, far_face(scores.nll, windows, self.plan.reach).mean
        noted = {"knots": list(arm.plan.schedule.values), "keep_counts": arm.keep_counts, "flops": scores.flops}
        value = quality if self.settings.objective == "quality" else far
        return {"value": value, "quality": quality, "far": far, "seconds": scores.seconds, "noted": noted}

    def note(self, trial: Trial, measured: dict[str, Any], events: Events) -> float:
        """Writes what was measured into the trial, and as a point at its number into ``events``; returns its value."""
        for key, value in measured["noted"].items():
            trial.set_user_attr(key, value)
        told = {key: measured[key] for key in ("quality", "far", "seconds")} | {"flops": measured["noted"]["flops"]}
        points = {f"trial/{key}": value for key, value in told.items() if value is not None}
        events.write(points | {f"point/{name}": trial.params[name] for name in self.names}, trial.number)
        budget = self.plan.budget
        trial.set_constraint("flops", abs(budget.distance(measured["noted"]["flops"])) - budget.tolerance)
        return measured["value"]

    def study_name(self, windows: EvalWindows) -> str:
        return f"search-{_study_key(self.config, self.plan, self.base, windows)[:12]}"

    def record(self, study: Study, windows: EvalWindows) -> tuple[dict[str, Any], PlannedArm]:
        """What results.json says of the search, and its best arm."""
        best, split = study.best_trial, self.settings.split
        record = {"trials": trial_rows(study), "best": best.number, "split": split, "windows": len(windows)}
        return record, self.planned(best.params)


def search_best_curve(
    folder: Path, search: CurveSearch, weights: LanguageModel, windows: EvalWindows, say: Callable[[str], None]
) -> tuple[dict[str, Any], PlannedArm]:
    """Best ``knots`` curve at the plan's budget on ``windows``: a record for results.json, and the arm."""
    settings = search.settings

    def measure(point: dict[str, float], trial: Trial) -> float:
        name = f"trial {trial.number}"
        progress.start(name, budget.flops)
        measured = search.measure(point, weights, windows, progress.windows_done)
        progress.finish(name, measured["quality"], measured["far"], measured["seconds"])
        return search.note(trial, measured, events)

    study = open_study(folder, search.study_name(windows))
    total, budget = settings.trials * len(windows), search.plan.budget
    with Events(folder / EVENTS_FOLDER) as events, SweepProgress(total, say, budget=budget) as progress:
        earlier = [row["value"] for row in trial_rows(study) if row["value"] is not None]
        best = min(earlier, default=None) if settings.objective == "quality" else None
        progress.skip("earlier trials", len(windows) * len(earlier), best)
        search_curves(study, search.anchors, search.names, settings.lowest, settings.trials, settings.seed, measure)
    return search.record(study, windows)


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
