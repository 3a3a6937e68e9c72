"""Tasks as trials of an Optuna study: the storage decides who runs which, on one host or on many.

A task is done once. A trial whose process went silent is put back by Optuna's heartbeat and its retry callback; what
falls between these two, a trial claimed but never announced or failed but never put back, is found here by comparing
the study with the list of tasks, which every process knows. A task that failed for its own reason stays failed while
anyone is at work; the next command tries it again.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError
from simba_lab.files import refused_write
from simba_lab.sweep.study import PATIENCE, RETRIES, lost_connection, patiently

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

TASK, CLAIM, ERROR = "task", "claim", "error"
TO_APPEAR = 60.0
LONGEST_REASON = 300


class TaskFailed(Exception):
    """The task itself is at fault: recorded with its reason, and not tried again."""


class GivenBack(Exception):
    """The process was told to stop: somebody else may run the task."""


@dataclass(frozen=True)
class Task:
    """Work with a result.

    Args:
        key: changes with whatever decides the result.
        label: how messages call it.
        params: parameters of its trial that are given, not suggested.
    """

    key: str
    label: str
    params: Mapping[str, Any] = field(default_factory=dict)


class Queue:
    """The tasks of one study.

    Args:
        open_study: opens the study anew; called once per thread.
        tasks: all of them, in the order they should be run in.
        done: whether the result of a task can be seen here; None: a complete trial is enough.
        place: of the task to begin with; processes that share a study begin in different places, not to meet.
        poll: seconds between two looks at the study while others are at work.
        grace: seconds after which a claimed trial that nobody announced is taken to be lost.
    """

    def __init__(
        self, open_study: Callable[[], optuna.Study], tasks: Sequence[Task],
        done: Callable[[Task], bool] | None = None, place: int = 0, poll: float = 0.5,
        grace: float = 15.0,
    ) -> None:  # fmt: skip
        self.open_study, self.poll, self.grace, self._visible = open_study, poll, grace, done
        first = place % max(1, len(tasks))
        self.tasks = {task.key: task for task in (*tasks[first:], *tasks[:first])}
        self.failed: dict[str, str] = {}
        self._done: set[str] = set()
        self._since: dict[Any, float] = {}
        self._claiming = threading.Lock()
        trials = patiently(lambda: open_study().get_trials(deepcopy=False))
        self._first = len(trials)
        at_work = any(trial.state.name == "RUNNING" for trial in trials)
        self._forgiven = set() if at_work else {trial.number for trial in trials if ERROR in trial.user_attrs}

    def work(self, run: Callable[[Trial, Task], float], stop: threading.Event) -> None:
        """Runs tasks, one at a time, until all are done or failed, wherever, or ``stop`` is set.

        ``run`` returns the value of the trial or raises TaskFailed or GivenBack. Any number of threads and processes
        may be in here. Raises InputError if the database does not answer for minutes.
        """
        study, unheard = patiently(self.open_study), None
        while not stop.is_set():
            told: dict[str, Any] = {}
            try:
                left = self._take(study, run, told)
                unheard = None
                if left == "nothing":
                    return
                if left == "others":
                    stop.wait(self.poll)
            except (*lost_connection(), ValueError) as error:
                if (isinstance(error, ValueError) and "number" not in told) or refused_write(error) is not None:
                    raise
                unheard = unheard or time.monotonic()
                if time.monotonic() - unheard > PATIENCE:
                    raise InputError(f"--storage: the database has not answered for {PATIENCE:.0f} s") from error
                self._settle(study, told, stop)

    def _take(self, study: optuna.Study, run: Callable[[Trial, Task], float], told: dict[str, Any]) -> str:
        """Looks for work and does one trial of it, by Optuna's own loop, which sends its signs of life.

        One thread at a time looks and claims, so that none finds the work gone that it saw.
        """
        self._claiming.acquire()
        claiming = True

        def objective(trial: Trial) -> float:
            nonlocal claiming
            told["number"] = trial.number
            task = self._claim(study, trial)
            self._claiming.release()
            claiming = False
            told["value"] = self._run(run, trial, task)
            return told["value"]

        try:
            left = self._look(study)
            if left == "work":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    study.optimize(objective, n_trials=1, catch=(TaskFailed, GivenBack))
            return left
        except AssertionError as error:
            # Optuna asserts, on its way out, that a trial has ended whose end it could not tell the database.
            if isinstance(error.__context__, lost_connection()):
                raise error.__context__ from None
            raise
        finally:
            if claiming:
                self._claiming.release()

    def _claim(self, study: optuna.Study, trial: Trial) -> Task:
        """The trial's task. Raises TrialPruned if it is no task of ours, done, or another's already."""
        from optuna import TrialPruned

        key = trial.user_attrs.get(TASK)
        if key not in self.tasks or self._another_has(study, self.tasks[key], trial.number):
            raise TrialPruned
        trial.set_user_attr(CLAIM, {"trial": trial.number, "host": os.uname().nodename, "process": os.getpid()})
        return self.tasks[key]

    def _another_has(self, study: optuna.Study, task: Task, number: int) -> bool:
        """Of several trials of one task, entered at once on several hosts, the first is the one that counts."""
        trials = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get(TASK) == task.key]
        earlier = [trial for trial in trials if trial.number < number]
        counts = 0 if self._visible is None else self._first
        complete = any(trial.state.name == "COMPLETE" and trial.number >= counts for trial in earlier)
        alive = any(trial.state.name in ("WAITING", "RUNNING") for trial in earlier)
        return complete or alive or (self._visible is not None and self._visible(task))

    def _run(self, run: Callable[[Trial, Task], float], trial: Trial, task: Task) -> float:
        try:
            return run(trial, task)
        except (GivenBack, *lost_connection()):
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, TaskFailed) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())[:LONGEST_REASON]
            self.failed[task.key] = reason
            trial.set_user_attr(ERROR, reason)
            raise TaskFailed(reason) from error

    def _settle(self, study: optuna.Study, told: dict[str, Any], stop: threading.Event) -> None:
        """After a lost connection: the outcome of the trial that could not be told is told now, or its loss."""
        from optuna.trial import TrialState

        stop.wait(self.poll)
        if "number" not in told:
            return
        try:
            if "value" in told:
                study.tell(told["number"], told["value"], skip_if_finished=True)
            else:
                study.tell(told["number"], state=TrialState.FAIL, skip_if_finished=True)
        except (*lost_connection(), ValueError):
            # Still no answer: the trial's heartbeat has ended, which returns it to the queue.
            return

    def _look(self, study: optuna.Study) -> str:
        """``work`` to take, work of ``others`` to wait for, or ``nothing``.

        A task enters the study when somebody is free for it: the fewer trials wait, the less every look has to read.
        """
        from optuna.storages import fail_stale_trials

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fail_stale_trials(study)
        trials: dict[str, list[FrozenTrial]] = {key: [] for key in self.tasks}
        for trial in study.get_trials(deepcopy=False):
            if (key := trial.user_attrs.get(TASK)) in trials:
                trials[key].append(trial)
        left = [key for key in self.tasks if key not in self._done]
        states = {key: self._state(study, self.tasks[key], trials[key]) for key in left}
        free = next((key for key, state in states.items() if state == "free"), None)
        if free is not None:
            study.enqueue_trial(dict(self.tasks[free].params), user_attrs={TASK: free})
            return "work"
        return next((state for state in ("work", "others") if state in states.values()), "nothing")

    def _state(self, study: optuna.Study, task: Task, trials: Sequence[FrozenTrial]) -> str:
        states = {trial.state.name for trial in trials}
        if self._visible(task) if self._visible else "COMPLETE" in states:
            self._done.add(task.key)
            self.failed.pop(task.key, None)
            return "nothing"
        if "WAITING" in states:
            return "work"
        if "RUNNING" in states:
            for trial in trials:
                self._end_if_never_announced(study, trial)
            return "others"
        since = [trial for trial in trials if trial.number >= self._first]
        if any(trial.state.name == "COMPLETE" for trial in since):
            return self._waits_to_appear(task, since)
        return self._free_or_failed(task, trials, since)

    def _free_or_failed(self, task: Task, trials: Sequence[FrozenTrial], since: Sequence[FrozenTrial]) -> str:
        errors = [t.user_attrs[ERROR] for t in trials if ERROR in t.user_attrs and t.number not in self._forgiven]
        lost = sum(trial.state.name == "FAIL" for trial in since)
        if errors or lost > 2 * RETRIES:
            self.failed[task.key] = errors[-1] if errors else f"lost {lost} times with the process that ran it"
            return "nothing"
        return "free"

    def _end_if_never_announced(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A process that dies between taking a trial and its first sign of life leaves it running for ever."""
        from optuna.trial import TrialState

        if trial.state.name != "RUNNING" or trial.user_attrs.get(CLAIM, {}).get("trial") == trial.number:
            return
        if self._waited(("claim", trial.number)) > self.grace:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _waits_to_appear(self, task: Task, trials: Sequence[FrozenTrial]) -> str:
        """A shared file system may show the result of another host late; a folder of one's own shows it never."""
        if self._waited(("result", task.key)) > TO_APPEAR:
            claims = [trial.user_attrs[CLAIM]["host"] for trial in trials if CLAIM in trial.user_attrs]
            raise InputError(
                f"--storage: {task.label} was measured on {', '.join(claims)}, but its result is not in this host's "
                "folder; the hosts of one study must share the folder"
            )
        return "others"

    def _waited(self, what: Any) -> float:
        now = time.monotonic()
        return now - self._since.setdefault(what, now)
