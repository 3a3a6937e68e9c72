"""Optuna keeps the books: one study for the arms, one for the search, in ``study.db`` of the sweep's folder or in the
database that several hosts share."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from simba_lab.environment import without_passwords
from simba_lab.errors import InputError
from simba_lab.files import refused_write

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE = "study.db"
MISSED_HEARTBEATS, RETRIES = 3, 3
PATIENCE = 300.0
T = TypeVar("T")


@dataclass(frozen=True)
class SharedStorage:
    """A database that several hosts work from.

    Args:
        url: as SQLAlchemy reads it, e.g. postgresql://user@host/name.
        heartbeat: seconds between two signs of life of a running trial; one that is silent three times as long is
            another host's to run.
    """

    url: str
    heartbeat: int = 20

    def open(self) -> optuna.storages.RDBStorage:
        """Raises InputError for an address that is wrong or a database that does not answer."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError

        cls = _patient_storage()
        for attempt in (1, 2, 3):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return cls(
                        self.url, engine_kwargs={"pool_pre_ping": True, "max_overflow": -1},
                        heartbeat_interval=self.heartbeat, grace_period=self.heartbeat * MISSED_HEARTBEATS,
                        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(RETRIES),
                    )  # fmt: skip
            except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ImportError) as error:
                raise InputError(f"--storage: {self}: {_line(error)}; give postgresql://user@host/database") from None
            except lost_connection() as error:
                # Hosts that start together all make the tables; all but one are refused and find them made.
                if attempt == 3:
                    raise InputError(f"--storage: {self} does not answer: {_line(error)}") from None
                time.sleep(attempt)
        raise AssertionError

    def __str__(self) -> str:
        return without_passwords(self.url)


def _line(error: BaseException) -> str:
    """What the driver said, without SQLAlchemy's advice."""
    return without_passwords(str(getattr(error, "orig", None) or error).strip().splitlines()[0])


def _patient_storage() -> type[optuna.storages.RDBStorage]:
    from optuna.storages import RDBStorage

    class PatientStorage(RDBStorage):
        """A sign of life that the database does not hear is not worth the life: the next one may be heard."""

        def record_heartbeat(self, trial_id: int) -> None:
            try:
                super().record_heartbeat(trial_id)
            except lost_connection():
                return

    return PatientStorage


def lost_connection() -> tuple[type[Exception], ...]:
    """What Optuna raises when its database does not answer, or has meanwhile given the trial to somebody else."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from sqlalchemy.exc import SQLAlchemyError

    return StorageInternalError, UpdateFinishedTrialError, SQLAlchemyError


def patiently(call: Callable[[], T], seconds: float = PATIENCE) -> T:
    """``call()``, again until the database answers. Raises InputError if that takes longer than ``seconds``.

    A disk that takes no more is no lost connection: that is raised at once.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except lost_connection() as error:
            if refused_write(error) is not None:
                raise
            if time.monotonic() > deadline:
                raise InputError(f"--storage: the database has not answered for {seconds:.0f} s") from error
            time.sleep(0.5)


def local_storage(folder: Path) -> optuna.storages.RDBStorage:
    """``study.db``. SQLite: only the process that holds the folder may write to it, its threads in turn."""
    import optuna

    url = f"sqlite:///{(folder / STUDY_FILE).resolve()}"
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})


def open_study(folder: Path, name: str) -> optuna.Study:
    """The study ``name`` of the folder's own book, made if it is new.

    Trials that a killed process left running, or waiting to be run, are marked failed.
    """
    from optuna.trial import TrialState

    study = named_study(local_storage(folder), name)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.tell(study.ask(), state=TrialState.FAIL)
    return study


def named_study(storage: optuna.storages.BaseStorage, name: str) -> optuna.Study:
    """Whose sampler is the cheapest: parameters are given, or the search brings a sampler of its own."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    options = {"sampler": optuna.samplers.RandomSampler(seed=0), "direction": "minimize", "load_if_exists": True}
    return optuna.create_study(storage=storage, study_name=name, **options)


def open_arms_study(folder: Path, names: Sequence[str]) -> optuna.Study:
    """The study of the arms; other arms than before get one of their own, since a parameter keeps its choices."""
    from simba_lab.sweep.store import digest

    study = open_study(folder, "arms")
    choices = {trial.distributions["arm"].choices for trial in study.trials if "arm" in trial.distributions}
    return study if choices <= {tuple(names)} else open_study(folder, f"arms-{digest(list(names))[:8]}")


def run_arm_trial(study: optuna.Study, name: str, names: Sequence[str], measure: Callable[[], float]) -> float:
    """One trial whose only parameter is the arm; a failure is recorded as one before it goes on."""
    from optuna.distributions import CategoricalDistribution

    study.enqueue_trial({"arm": name})
    trial = study.ask({"arm": CategoricalDistribution(list(names))})
    return _finished(study, trial, measure)


def _finished(study: optuna.Study, trial: Trial, measure: Callable[[], float]) -> float:
    from optuna.trial import TrialState

    try:
        value = measure()
    except BaseException as error:
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        study.tell(trial, state=TrialState.FAIL)
        raise
    study.tell(trial, value)
    return value


def search_curves(
    study: optuna.Study,
    anchors: Sequence[dict[str, float]],
    names: Sequence[str],
    lowest: float,
    trials: int,
    seed: int,
    measure: Callable[[dict[str, float], Trial], float],
) -> FrozenTrial:
    """Ask and tell until ``trials`` are complete; the anchors come first. Returns the best.

    Trial n draws from a sampler seeded by (seed, n) that knows the finished trials, so that a search that was stopped
    and continued makes the same suggestions as one that was not.
    """
    from optuna.trial import TrialState

    while (number := len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))) < trials:
        study.sampler = sampler(seed, number)
        if number < len(anchors):
            study.enqueue_trial(anchors[number])
        trial = study.ask()
        point = {name: trial.suggest_float(name, lowest, 1.0) for name in names}
        _finished(study, trial, lambda point=point, trial=trial: measure(point, trial))
    return study.best_trial


def sampler(seed: int, number: int, several: bool = False) -> optuna.samplers.TPESampler:
    """Of trial ``number``; with ``several`` at once it keeps away from those that are running."""
    from optuna.samplers import TPESampler

    own = (seed * 100_003 + number) % 2**32
    return TPESampler(seed=own, multivariate=True, n_startup_trials=8, constant_liar=several)


def trial_rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial as plain data: number, state, value and what its measurement noted."""
    return [
        {"number": trial.number, "state": trial.state.name, "value": trial.value, "knots": None, "keep_counts": None}
        | dict(trial.user_attrs)
        for trial in study.get_trials(deepcopy=False)
    ]
