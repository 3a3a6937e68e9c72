"""Optuna keeps the books: one study for the arms, one for the search, both in ``study.db`` of the sweep's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE = "study.db"


def open_study(folder: Path, name: str) -> optuna.Study:
    """The study ``name``, made if it is new. Trials that a killed process left running are marked failed."""
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY_FILE).resolve()}")
    study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


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
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    while (number := len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))) < trials:
        study.sampler = TPESampler(seed=seed * 100_003 + number, multivariate=True, n_startup_trials=8)
        if number < len(anchors):
            study.enqueue_trial(anchors[number])
        trial = study.ask()
        point = {name: trial.suggest_float(name, lowest, 1.0) for name in names}
        _finished(study, trial, lambda point=point, trial=trial: measure(point, trial))
    return study.best_trial


def trial_rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Every trial as plain data: number, state, value and what its measurement noted."""
    return [
        {"number": trial.number, "state": trial.state.name, "value": trial.value, "knots": None, "keep_counts": None}
        | dict(trial.user_attrs)
        for trial in study.get_trials(deepcopy=False)
    ]
