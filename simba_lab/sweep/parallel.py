"""A sweep by several workers, on one host or on many: training, search and arms, each a queue of tasks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError
from simba_lab.sweep.children import shares
from simba_lab.sweep.measure import Measurement
from simba_lab.sweep.plan import PlannedArm
from simba_lab.sweep.pool import Pool, Slot
from simba_lab.sweep.progress import SweepProgress
from simba_lab.sweep.queue import TASK, GivenBack, Queue, Task, TaskFailed
from simba_lab.sweep.search import ARM_NAME, EVENTS_FOLDER, CurveSearch
from simba_lab.sweep.store import StoredArm, digest
from simba_lab.sweep.study import SharedStorage, local_storage, named_study, open_arms_study, open_study, sampler
from simba_lab.sweep.training import train_if_missing
from simba_lab.training import Experiment
from simba_lab.training.events import Events

if TYPE_CHECKING:
    import optuna
    from optuna.trial import Trial


class Team:
    """The workers of this host and the storage that says what is left to do.

    Args:
        workers: trials at once on this host.
        gpus_per_worker: of this host's GPUs; None: one each, shared where there are fewer.
        storage: shared with other hosts; None: ``study.db`` of the folder, which this process alone writes to.
    """

    def __init__(
        self, name: str, measurement: Measurement, folder: Path, say: Callable[[str], None],
        workers: int, storage: SharedStorage | None, gpus_per_worker: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.measurement, self.folder, self.say = name, measurement, folder, say
        self.shares, self.gpus_per_worker = shares(workers, gpus_per_worker), gpus_per_worker
        self.storage, self.plan = storage, measurement.plan
        # Alone, in the order of the file; beside others, from anywhere.
        self._place = 0 if storage is None else int(digest(os.uname().nodename, os.getpid())[:8], 16)
        self._best: dict[str, float] = {}
        self._talking = threading.Lock()

    def train(self, experiments: Sequence[Experiment]) -> None:
        """Experiments that a worker has the devices for side by side; one that wants more has the host to itself."""
        needed = {digest(str(e.folder), e.resolved): e for e in experiments}
        tasks = [Task(key, str(experiment.path)) for key, experiment in needed.items()]
        if all(experiment.is_trained() for experiment in experiments):
            return
        alone = any(_wants_more_devices(experiment, self.gpus_per_worker) for experiment in experiments)
        pool = Pool(self.shares, self.measurement.config, self.folder)

        def is_trained(task: Task) -> bool:
            return needed[task.key].is_trained()

        def run(slot: Slot, trial: Trial, task: Task) -> float:
            try:
                train_if_missing(needed[task.key], self.say, [] if alone else slot.settings, pool.stop)
            except InputError as error:
                raise TaskFailed(str(error)) from None
            if pool.stop.is_set():
                raise GivenBack
            return 0.0

        queue = Queue(self._opener("training", tasks), tasks, is_trained, self._place)
        pool.empty(queue, run, 1 if alone else None)
        _refuse_failed(queue, "trainings")

    def search(self, search: CurveSearch) -> tuple[dict[str, Any], PlannedArm]:
        """The trials of the search, ``workers`` at once: the points after the anchors depend on what was finished."""
        settings, windows = search.settings, self.measurement.search_windows
        name, anchors = search.study_name(windows), search.anchors
        points = [anchors[i] if i < len(anchors) else {} for i in range(settings.trials)]
        opener = self._opener(name, [])
        alone = [t for t in opener().get_trials(deepcopy=False) if t.value is not None and TASK not in t.user_attrs]
        tasks = [Task(str(i), f"trial {i}", points[i]) for i in range(len(alone), settings.trials)]
        total, budget = settings.trials * len(windows), self.plan.budget
        with Events(self.folder / EVENTS_FOLDER) as events, SweepProgress(total, self.say, budget=budget) as progress:

            def run(slot: Slot, trial: Trial, task: Task) -> float:
                point = {key: trial.suggest_float(key, settings.lowest, 1.0) for key in search.names}
                measured = slot.ask(trial, {"point": point})
                self._tell(progress, task.label, len(windows), measured, measured["quality"])
                return search.note(trial, measured, events)

            queue = Queue(lambda: _with_sampler(opener(), settings.seed), tasks, place=self._place)
            Pool(self.shares, self.measurement.config, self.folder).empty(queue, run)
        _refuse_failed(queue, "trials of the search")
        self._best = opener().best_trial.params
        return search.record(opener(), windows)

    def measure(self, arms: Sequence[PlannedArm]) -> list[StoredArm]:
        """Every arm once, in the order of ``arms``. Raises InputError naming the arms that failed."""
        names, windows, store = [arm.name for arm in arms], self.measurement.windows, self.measurement.store
        prints = {arm.name: self.measurement.fingerprint(arm) for arm in arms}
        tasks = [Task(digest(arm.name, prints[arm.name]), arm.name, {"arm": arm.name}) for arm in arms]
        points = {ARM_NAME: {"point": self._best}} if self._best else {}

        def done(task: Task) -> bool:
            return store.load(task.label, prints[task.label]) is not None

        total, live = len(arms) * len(windows), [(arm.name, arm.arm.flops) for arm in arms]
        with SweepProgress(total, self.say, live, self.plan.budget, self.folder) as progress:
            for name, fingerprint in prints.items():
                if kept := store.load(name, fingerprint):
                    progress.skip(name, len(windows), *self.measurement.faces(kept))

            def run(slot: Slot, trial: Trial, task: Task) -> float:
                name = trial.suggest_categorical("arm", names)
                message = {"arm": name, "fingerprint": prints[name]} | points.get(name, {})
                measured = slot.ask(trial, message)
                self._tell(progress, name, len(windows), measured, measured["value"])
                return measured["value"]

            if not all(done(task) for task in tasks):
                queue = Queue(self._opener("arms", tasks, names), tasks, done, self._place)
                Pool(self.shares, self.measurement.config, self.folder).empty(queue, run)
                _refuse_failed(queue, "arms")
        return [store.load(name, prints[name]) for name in names]

    def _opener(
        self, what: str, tasks: Sequence[Task], names: Sequence[str] | None = None
    ) -> Callable[[], optuna.Study]:
        """Opens the study, after what an earlier process left in the folder's own book has been put in order."""
        if self.storage is None:
            study = open_study(self.folder, what) if names is None else open_arms_study(self.folder, names)
            storage, full_name = local_storage(self.folder), study.study_name
        else:
            storage = self.storage.open()
            full_name = "-".join([self.name, what, *([digest([task.key for task in tasks])[:8]] if tasks else [])])
        return lambda: named_study(storage, full_name)

    def _tell(
        self, progress: SweepProgress, name: str, windows: int, measured: Mapping[str, Any], quality: float
    ) -> None:
        with self._talking:
            progress.start(name, self.plan.budget.flops)
            progress.windows_done(windows)
            progress.finish(name, quality, measured["far"], measured["seconds"])


def _wants_more_devices(experiment: Experiment, gpus_per_worker: int | None) -> bool:
    """More than a worker has; ``auto`` takes the worker's, if their number was given."""
    import torch

    devices = experiment.resolved["trainer"]["devices"]
    if devices == "auto":
        return gpus_per_worker is None and torch.cuda.device_count() > 1
    # Devices named by their numbers are the host's.
    return not (str(devices).isdecimal() and 0 < int(devices) <= (gpus_per_worker or 1))


def _with_sampler(study: optuna.Study, seed: int) -> optuna.Study:
    study.sampler = _sampler_by_trial(seed)
    return study


def _sampler_by_trial(seed: int) -> optuna.samplers.BaseSampler:
    """Task n of a search draws from a sampler seeded by (seed, n), whichever process runs it."""
    from optuna.samplers import BaseSampler

    class ByTrial(BaseSampler):
        def _own(self, trial: Any) -> optuna.samplers.TPESampler:
            return sampler(seed, int(trial.user_attrs.get(TASK, 0)), several=True)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return self._own(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return self._own(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self._own(trial).sample_independent(study, trial, param_name, param_distribution)

    return ByTrial()


def _refuse_failed(queue: Queue, what: str) -> None:
    if queue.failed:
        reasons = "; ".join(f"{queue.tasks[key].label}: {reason}" for key, reason in queue.failed.items())
        raise InputError(f"{len(queue.failed)} of {len(queue.tasks)} {what} failed, the others are kept: {reasons}")
