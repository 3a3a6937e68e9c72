"""A sweep from file to results: plan, train what is missing, measure what is missing, write results.json."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simba_lab.budget import check_realised, verify
from simba_lab.checkpoint import SPEC_FILE, WEIGHTS_FILE, load
from simba_lab.data import EvalWindows
from simba_lab.errors import InputError
from simba_lab.evaluate.windows import far_face, plain_face, score_windows
from simba_lab.files import write_json
from simba_lab.model import LanguageModel
from simba_lab.sweep.config import SweepConfig
from simba_lab.sweep.plan import PlannedArm, SweepPlan, make_plan, model_of
from simba_lab.sweep.progress import SweepProgress
from simba_lab.sweep.results import assemble
from simba_lab.sweep.search import check_search, search_best_curve
from simba_lab.sweep.store import ArmStore, StoredArm, digest, only_one
from simba_lab.sweep.study import open_study, run_arm_trial
from simba_lab.training import Experiment, read_experiment

RESULTS_FILE = "results.json"


def run_sweep(name: str, config: SweepConfig, say: Callable[[str], None] = print) -> Path:
    """Carry out a sweep; what is already there is not done again. Returns the path of results.json.

    Raises BudgetMismatch before anything is trained if the arms cannot be matched, and after the measurement if what
    ran is not what was planned; InputError for wrong input.
    """
    folder = Path(config.folder or f"runs/sweeps/{name}")
    base = read_experiment(Path(config.experiment))
    others = {entry.experiment: read_experiment(Path(entry.experiment)) for entry in config.arms if entry.experiment}
    plan = make_plan(config, base, others)
    if config.search:
        check_search(config, base, plan.budget)
    for arm in plan.arms:
        _verify(arm)
    say(f"{name}: {len(plan.arms)} arms, {plan.budget}")
    sweep = _Sweep(name, config, plan, folder, base, say)
    with only_one(folder):
        for experiment in plan.experiments:
            train_if_missing(experiment, say)
        return sweep.run()


def _verify(arm: PlannedArm) -> None:
    """The closed form against the counter, op by op, on a model without weights."""
    import torch

    with torch.device("meta"):
        model = LanguageModel(arm.arm.config, arm.plan, seed=None)
    verify(model, arm.arm.n_context, arm.arm.n_suffix)


def train_if_missing(experiment: Experiment, say: Callable[[str], None]) -> None:
    """Run ``simba-lab fit`` on the experiment, continuing from its last checkpoint, unless its run is finished."""
    if experiment.is_trained():
        say(f"{experiment.folder}: already trained")
        return
    say(f"{experiment.folder}: training {experiment.path}")
    command = [sys.executable, "-m", "simba_lab", "fit", "--config", str(experiment.path)]
    if (experiment.folder / "checkpoints" / "last.ckpt").is_file():
        command += ["--ckpt_path", "last"]
    child = subprocess.Popen(command)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()
        raise
    if code != 0 or not experiment.is_trained():
        raise InputError(f"training of {experiment.path} ended with exit code {code}; its own message is above")


class _Sweep:
    """One sweep at work: weights, windows and the store of finished arms.

    Windows are cut at once: a file that asks for windows the data does not have is refused before training.
    """

    def __init__(
        self, name: str, config: SweepConfig, plan: SweepPlan, folder: Path, base: Experiment,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.name, self.config, self.plan, self.folder, self.base, self.say = name, config, plan, folder, base, say
        self.store = ArmStore(folder / "arms")
        self.windows = self._windows(config.split, config.windows)
        self.search_windows = self._windows(config.search.split, config.search.windows) if config.search else None
        self._weights: dict[Path, LanguageModel] = {}

    def _windows(self, split: str, count: int) -> EvalWindows:
        return self.base.data.eval_windows(split, self.config.n_context, self.config.n_suffix, count)

    def run(self) -> Path:
        search = self._search() if self.config.search else None
        arms, planned = self.plan.arms, self.plan.solutions()
        stored = []
        study = open_study(self.folder, "arms")
        with SweepProgress(len(arms) * len(self.windows), self.say) as progress:
            for arm in arms:
                stored.append(self._measure(arm, study, [a.name for a in arms], progress))
        matched = {arm.name: kept.flops for arm, kept in zip(arms, stored, strict=True) if arm.matched}
        check_realised(planned, matched, self.plan.budget)
        runs = [str(self.store.path(arm.name).relative_to(self.folder)) for arm in arms]
        self.say("comparing the arms")
        results = assemble(self.name, self.config, self.plan, stored, runs, self.windows, search)
        write_json(self.folder / RESULTS_FILE, results)
        return self.folder / RESULTS_FILE

    def weights(self, experiment: Experiment) -> LanguageModel:
        if experiment.folder not in self._weights:
            self._weights[experiment.folder] = load(experiment.folder)
        return self._weights[experiment.folder]

    def _fingerprint(self, arm: PlannedArm, windows: EvalWindows) -> str:
        folder = arm.experiment.folder
        return digest(arm.spec(), folder / SPEC_FILE, folder / WEIGHTS_FILE, windows.tokens.numpy())

    def _measure(self, arm: PlannedArm, study: Any, names: list[str], progress: SweepProgress) -> StoredArm:
        fingerprint = self._fingerprint(arm, self.windows)
        kept = self.store.load(arm.name, fingerprint)
        if kept is not None:
            progress.skip(arm.name, len(self.windows))
            return kept

        def measure() -> float:
            nonlocal kept
            progress.start(arm.name)
            model = model_of(arm, self.weights(arm.experiment))
            scores = score_windows(
                model, self.windows, self.config.batch_size, arm.arm.n_context, progress.windows_done
            )
            details = arm.spec() | {"weights": str(arm.experiment.folder), "backend": model.backend.name}
            kept = self.store.save(arm.name, fingerprint, scores, details)
            quality, far = plain_face(kept.nll).mean, far_face(kept.nll, self.windows, self.plan.reach).mean
            progress.finish(arm.name, quality, far, scores.seconds)
            return quality

        run_arm_trial(study, arm.name, names, measure)
        return kept

    def _search(self) -> dict[str, Any]:
        """Search on its own windows; the winner joins the arms of the comparison."""
        found, arm = search_best_curve(
            self.folder, self.config, self.plan, self.base, self.weights(self.base), self.search_windows, self.say
        )
        self.plan.arms.append(arm)
        return found
