"""How much of the spread in quality each swept parameter explains: Optuna's fANOVA over what was measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import COLOURS, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.folders import Comparison
from simba_lab.report.results import Arm
from simba_lab.report.wording import shortened

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes

STUDY_FILE = "study.db"
FORESTS, LEAST = 3, 6

# parameter -> its share by each of several forests
Shares = Mapping[str, Sequence[float]]


def importance_figure(comparison: Comparison) -> Figure | None:
    """Importance of the search's parameters and of criterion and schedule; None where neither varied enough."""
    panels = {
        "search, by value of the objective": search_shares(comparison),
        "arms at the budget, by plain NLL": arm_shares(comparison.results["arms"]),
    }
    shown = {name: shares for name, shares in panels.items() if shares}
    if not shown:
        return None
    key, title = f"{comparison.prefix}importance", "Importance of each sweep parameter"

    def build() -> Drawn:
        rows = sum(map(len, shown.values()))
        figure = canvas(WIDTH, 0.9 * len(shown) + 0.34 * rows)
        grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=[*map(len, shown.values())])
        for axes, (name, shares) in zip(grid[:, 0], shown.items(), strict=True):
            _bars(axes, shares)
            axes.set_title(name)
        grid[-1, 0].set_xlabel("share of the explained variance (0 to 1)")
        return figure, {}

    table = as_csv(
        ["panel", "parameter", "share", "lowest", "highest"],
        [[name, p, _mean(v), min(v), max(v)] for name, shares in shown.items() for p, v in shares.items()],
    )
    return Figure(key, title, _caption(shown), draw(key, title, build), table)


def _bars(axes: Axes, shares: Shares) -> None:
    names = sorted(shares, key=lambda name: _mean(shares[name]))
    for row, name in enumerate(names):
        values = shares[name]
        axes.barh(row, _mean(values), color=COLOURS[0], height=0.55)
        axes.plot([min(values), max(values)], [row, row], color=COLOURS[1], linewidth=3)
        axes.annotate(f"{_mean(values):.2f}", (max(values), row), xytext=(6, -3), textcoords="offset points")
    axes.set_yticks(range(len(names)), [shortened(name, 28) for name in names])
    axes.set(xlim=(0, 1.05), ylim=(-0.6, len(names) - 0.4))


def _caption(shown: Mapping[str, Shares]) -> str:
    told = (
        "fANOVA of Optuna: the variance in quality that each parameter explains by itself, as a share (no unit) of "
        f"what all of them explain; mean of {FORESTS} forests, the line from the lowest to the highest of them."
    )
    if any(name.startswith("search") for name in shown):
        told += (
            " drop_i is the ratio of the i-th height of the curve to the one before it; trials crowd where the search "
            "looked, so the shares describe its path as well as the quality."
        )
    if any(name.startswith("arms") for name in shown):
        told += " Arms that differ in nothing but a seed or an option count as one criterion."
    return told


def search_shares(comparison: Comparison) -> Shares:
    """Shares of the search's parameters, from the study in the run folder whose trials the results list."""
    search, folder = comparison.results.get("search"), comparison.folder
    if not search or folder is None or not (folder / STUDY_FILE).is_file():
        return {}
    study = _quietly(lambda: _study_of(f"sqlite:///{(folder / STUDY_FILE).resolve()}", search["trials"]))
    return {} if study is None else _shares(study)


def _study_of(storage: str, trials: Sequence[Mapping[str, Any]]) -> optuna.Study | None:
    """The study with the values of `trials`; a run folder holds one study per setting of its search."""
    import optuna

    values = [trial["value"] for trial in trials]
    try:
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            if [trial.value for trial in study.get_trials(deepcopy=False)] == values:
                return study
    except Exception:  # whatever a damaged database raises, the page can do without this figure and says so
        return None
    return None


def arm_shares(arms: Sequence[Arm]) -> Shares:
    """Shares of schedule and criterion among the matched pruned arms."""
    pruned = [arm for arm in arms if arm["kind"] == "pruned" and arm["matched"] and arm["quality"] is not None]
    rows = [{"schedule": str(arm["schedule"]), "criterion": str(arm["criterion"])} for arm in pruned]
    varied = [name for name in ("schedule", "criterion") if len({row[name] for row in rows}) > 1]
    if len(varied) < 2 or len(rows) < LEAST:
        return {}
    return _shares(_quietly(lambda: _study_from(rows, varied, [arm["quality"] for arm in pruned])))


def _study_from(rows: Sequence[Mapping[str, str]], names: Sequence[str], values: Sequence[float]) -> optuna.Study:
    import optuna
    from optuna.distributions import CategoricalDistribution

    choices = {name: CategoricalDistribution(list(dict.fromkeys(row[name] for row in rows))) for name in names}
    study = optuna.create_study()
    for row, value in zip(rows, values, strict=True):
        params = {name: row[name] for name in names}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=choices, value=value))
    return study


def _shares(study: optuna.Study) -> Shares:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(done) < LEAST or len({trial.value for trial in done}) < 2:
        return {}
    forests = [
        get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=32, seed=seed))
        for seed in range(FORESTS)
    ]
    return {name: [float(forest[name]) for forest in forests] for name in sorted(forests[0])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quietly(work: Callable[[], Any]) -> Any:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    finally:
        optuna.logging.set_verbosity(before)
