"""A sweep from file to results: plan, train what is missing, measure what is missing, write results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from simba_lab.budget import Solution, check_realised, seal, verify
from simba_lab.errors import InputError
from simba_lab.files import clear_partial, write_json
from simba_lab.model import LanguageModel
from simba_lab.sweep.config import SweepConfig
from simba_lab.sweep.measure import Measurement
from simba_lab.sweep.parallel import Team
from simba_lab.sweep.plan import PlannedArm, make_plan
from simba_lab.sweep.progress import SweepProgress
from simba_lab.sweep.results import assemble
from simba_lab.sweep.search import CurveSearch, check_search, search_best_curve
from simba_lab.sweep.store import StoredArm
from simba_lab.sweep.study import SharedStorage, open_arms_study, run_arm_trial
from simba_lab.sweep.training import train_if_missing
from simba_lab.training import read_experiment
from simba_lab.training.folder import only_one

RESULTS_FILE = "results.json"


def run_sweep(
    name: str, config: SweepConfig, say: Callable[[str], None] = print,
    workers: int = 1, storage: SharedStorage | None = None, gpus_per_worker: int | None = None,
) -> Path:  # fmt: skip
    """Carry out a sweep; what is already there is not done again. Returns the path of results.json.

    With ``workers`` so many trials run at once, each with ``gpus_per_worker``; with ``storage`` all hosts that name it
    and share the folder run one study. Raises BudgetMismatch before anything is trained if the arms cannot be matched,
    and after the measurement if what ran is not what was planned; InputError for wrong input.
    """
    if config.device.startswith("cuda:") and (workers > 1 or gpus_per_worker is not None):
        raise InputError(f"device: {config.device} is one GPU, and every worker has its own; give auto or cuda")
    folder = Path(config.folder or f"runs/sweeps/{name}")
    base = read_experiment(Path(config.experiment))
    others = {entry.experiment: read_experiment(Path(entry.experiment)) for entry in config.arms if entry.experiment}
    plan = make_plan(config, base, others)
    if config.search:
        check_search(config, base, plan.budget)
    for arm in plan.arms:
        _verify(arm)
    say(f"{name}: {len(plan.arms)} arms, {plan.budget}")
    sweep = _Sweep(name, Measurement(config, plan, folder, base), folder, say)
    with only_one(folder, shared=storage is not None):
        if storage is None:
            for place in (folder, *(folder / "arms").glob("*")):
                clear_partial(place)
        if workers == 1 and storage is None and gpus_per_worker is None:
            return sweep.alone()
        return sweep.together(workers, storage, gpus_per_worker)


def _verify(arm: PlannedArm) -> None:
    """The closed form against the counter, op by op, on a model without weights."""
    import torch

    with torch.device("meta"):
        model = LanguageModel(arm.arm.config, arm.plan, seed=None)
    verify(model, arm.arm.n_context, arm.arm.n_suffix)


class _Sweep:
    """One sweep at work."""

    def __init__(self, name: str, measurement: Measurement, folder: Path, say: Callable[[str], None]) -> None:
        self.name, self.measurement, self.folder, self.say = name, measurement, folder, say
        self.config, self.plan, self.base = measurement.config, measurement.plan, measurement.base

    def alone(self) -> Path:
        """Everything in this process, one after the other."""
        for experiment in self.plan.experiments:
            train_if_missing(experiment, self.say)
        search = self._search() if self.config.search else None
        arms, planned = self.plan.arms, self.plan.solutions()
        names = [arm.name for arm in arms]
        study = open_arms_study(self.folder, names)
        total, live = len(arms) * len(self.measurement.windows), [(arm.name, arm.arm.flops) for arm in arms]
        with SweepProgress(total, self.say, live, self.plan.budget, self.folder) as progress:
            before = [self._measured_before(arm, progress) for arm in arms]  # all at once: the time left is the rest's
            stored = [
                kept or self._measure(arm, study, names, progress) for arm, kept in zip(arms, before, strict=True)
            ]
        return self._write(planned, stored, search)

    def together(self, workers: int, storage: SharedStorage | None, gpus_per_worker: int | None) -> Path:
        """By workers, each a process of its own, and with the other hosts that name the storage."""
        team = Team(self.name, self.measurement, self.folder, self.say, workers, storage, gpus_per_worker)
        team.train(self.plan.experiments)
        search = None
        if self.config.search:
            search, arm = team.search(CurveSearch(self.config, self.plan, self.base))
            self.plan.arms.append(arm)
        planned = self.plan.solutions()
        return self._write(planned, team.measure(self.plan.arms), search)

    def _write(self, planned: list[Solution], stored: list[StoredArm], search: dict[str, Any] | None) -> Path:
        arms, store = self.plan.arms, self.measurement.store
        matched = {arm.name: kept.flops for arm, kept in zip(arms, stored, strict=True) if arm.matched}
        check_realised(planned, matched, self.plan.budget)
        runs = [str(store.path(arm.name).relative_to(self.folder)) for arm in arms]
        self.say("comparing the arms")
        results = assemble(self.name, self.config, self.plan, stored, runs, self.measurement.windows, search)
        seal(results, self.folder)
        write_json(self.folder / RESULTS_FILE, results)
        return self.folder / RESULTS_FILE

    def _measured_before(self, arm: PlannedArm, progress: SweepProgress) -> StoredArm | None:
        kept = self.measurement.stored(arm)
        if kept is not None:
            progress.skip(arm.name, len(self.measurement.windows), *self.measurement.faces(kept))
        return kept

    def _measure(self, arm: PlannedArm, study: Any, names: list[str], progress: SweepProgress) -> StoredArm:
        kept = None

        def measure() -> float:
            nonlocal kept
            progress.start(arm.name)
            kept = self.measurement.measure(arm, self.measurement.fingerprint(arm), progress)
            quality, far = self.measurement.faces(kept)
            progress.finish(arm.name, quality, far, kept.record["wall_seconds"])
            return quality

        run_arm_trial(study, arm.name, names, measure)
        return kept

    def _search(self) -> dict[str, Any]:
        """Search on its own windows; the winner joins the arms of the comparison."""
        search, weights = CurveSearch(self.config, self.plan, self.base), self.measurement.weights(self.base)
        found, arm = search_best_curve(self.folder, search, weights, self.measurement.search_windows, self.say)
        self.plan.arms.append(arm)
        return found
