"""Several run folders on one page: what is left out and why, and arms of unequal budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_results
import optuna
import pytest
import tiny
from made_results import BUDGET

from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.report.context_figure import context_figure
from simba_lab.report.curve_figures import keep_figure
from simba_lab.report.figures import flops_figure
from simba_lab.report.folders import Comparison, gather
from simba_lab.report.importance import search_shares
from simba_lab.report.provenance import reproduction


@pytest.fixture(autouse=True)
def made_up_folders_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arms hold no likelihoods to check results against; tests/test_tampering.py checks those of real ones."""
    monkeypatch.setattr("simba_lab.budget.check_evidence", lambda path, results: False)


def sweep(path: Path, change: Callable[[dict[str, Any]], None] = lambda results: None) -> Path:
    """A sweep's folder of four arms: small-dense, short-context, dense, uniform/global_impact."""
    results = made_results.example()
    results["arms"] = results["arms"][:4]
    results["name"] = path.name
    change(results)
    return made_results.folder(path, results)


def half_the_context(results: dict[str, Any]) -> None:
    results |= {"n_context": 480, "budget_flops": BUDGET // 2}
    for arm in results["arms"]:
        arm |= {"flops": arm["flops"] // 2, "keep_counts": [k // 2 for k in arm["keep_counts"]]}


def another_version(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["environment"]["simba-lab"] = "0.0.7"
    (folder / "results.json").write_text(json.dumps(results))


def an_older_layout(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    del results["n_suffix"]
    (folder / "results.json").write_text(json.dumps(results))


def of_a_training(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "run.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "results.json").unlink(), "incomplete: 4 arms measured, no results.json"),
        (another_version, "written by simba-lab 0.0.7"),
        (an_older_layout, "key n_suffix is missing"),
        (of_a_training, "the run folder of a training"),
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "arms" / "small-dense" / "nll.npy").unlink(), "the others are compared with"),
    ],
)
def test_a_folder_that_cannot_be_shown_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], reason: str
) -> None:
    good, bad = sweep(tmp_path / "good"), sweep(tmp_path / "bad")
    spoil(bad)
    assert reason in tiny.mistake(capsys, "report", bad)
    assert not (bad / "report.html").exists()
    gathered = gather([bad, good], tmp_path / "report.html")
    assert [one.name for one in gathered.comparisons] == ["good"]
    assert [(one.path, reason in one.reason) for one in gathered.skipped] == [(str(bad), True)]


def test_the_page_and_the_command_say_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = sweep(tmp_path / "good"), sweep(tmp_path / "bad")
    another_version(bad)
    assert tiny.simba_lab("report", bad, good, "--json", tmp_path / "r.json") == 0
    page = (tmp_path / "report.html").read_text()
    assert 'id="left-out"' in page and "written by simba-lab 0.0.7" in page
    assert 'href="./good/arms/dense/arm.json"' in page, "links start where the page stands"
    assert f"left out: {bad}: written by simba-lab 0.0.7" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "r.json").read_text())["left_out"]) == [str(bad)]


def no_measurement(folder: Path) -> str:
    (folder / "arms" / "dense" / "arm.json").unlink()
    return "incomplete: arm.json is missing"


def other_measurement(folder: Path) -> str:
    (folder / "arms" / "dense" / "arm.json").write_text('{"flops_by_op": {"scan": 1}}')
    return "holds another measurement than results.json"


def cut_off(folder: Path) -> str:
    (folder / "arms" / "dense" / "arm.json").write_text('{"flops_by')
    return "not one that this version writes"


def outside(folder: Path) -> str:
    results = json.loads((folder / "results.json").read_text())
    results["arms"][2]["run"] = "../../etc"
    (folder / "results.json").write_text(json.dumps(results))
    return "lies outside the sweep's"


@pytest.mark.parametrize("spoil", [no_measurement, other_measurement, cut_off, outside])
def test_an_arm_without_its_run_is_left_out_of_every_number(tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    folder = sweep(tmp_path / "good")
    reason = spoil(folder)
    gathered = gather([folder], tmp_path / "report.html")
    names = [arm["name"] for arm in gathered.comparisons[0].results["arms"]]
    assert names == ["small-dense", "short-context", "uniform/global_impact"]
    assert any(reason in one.reason for one in gathered.skipped)


def test_a_left_over_run_is_mentioned(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "good")
    (folder / "arms" / "older").mkdir()
    (skipped,) = gather([folder], tmp_path / "report.html").skipped
    assert skipped.path.endswith("older") and "unfinished, and not part of" in skipped.reason


def test_sweeps_of_unequal_budget_are_refused_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, short = sweep(tmp_path / "long"), sweep(tmp_path / "short", half_the_context)
    assert tiny.simba_lab("report", long, short) == 3
    error = capsys.readouterr().err
    assert f"long has a budget of {BUDGET}" in error and f"short {BUDGET // 2}" in error
    assert not (tmp_path / "report.html").exists()
    assert tiny.simba_lab("report", long, short, "--allow-unequal") == 0
    page = (tmp_path / "report.html").read_text()
    before, unequal = page.split('<section id="unequal"')
    assert "Unequal budget" in unequal and 'id="b-arms"' in unequal and 'id="b-arms"' not in before
    assert 'id="a-arms"' in before and 'id="figure-b-forest"' not in page


def dearer(results: dict[str, Any]) -> None:
    results["arms"][3]["flops"] = round(BUDGET * 1.02)


def test_an_arm_of_unequal_budget_is_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "one", dearer)
    with pytest.raises(BudgetMismatch, match=r"uniform/global_impact 42075000000 \(\+2.00 %\)"):
        gather([folder], tmp_path / "report.html")
    gathered = gather([folder], tmp_path / "report.html", allow_unequal=True)
    assert [len(one.results["arms"]) for one in gathered.comparisons + gathered.unequal] == [3, 1]
    assert tiny.simba_lab("report", folder, "--allow-unequal") == 0
    page = (folder / "report.html").read_text()
    assert page.split('<section id="unequal"')[0].count("<tbody>\n<tr") == 2
    assert 'id="unequal-arms"' in page


def test_without_any_budget_left_nothing_is_written(tmp_path: Path) -> None:
    def all_dearer(results: dict[str, Any]) -> None:
        results["budget_flops"] *= 2
        results["arms"] = [arm for arm in results["arms"] if arm["matched"]]

    with pytest.raises(InputError, match="no arm costs the budget"):
        gather([sweep(tmp_path / "one", all_dearer)], tmp_path / "report.html", allow_unequal=True)


def test_context_lengths_of_several_sweeps_are_joined(tmp_path: Path) -> None:
    long, short = sweep(tmp_path / "long"), sweep(tmp_path / "short", half_the_context)
    gathered = gather([long, short], tmp_path / "r.html", allow_unequal=True)
    figure = context_figure(gathered.comparisons + gathered.unequal)
    assert figure is not None and "at different context lengths" in figure.caption
    lengths = {line.split(",")[2] for line in figure.csv.splitlines()[1:]}
    assert lengths == {"960", "545", "480", "272"}


def test_sweeps_of_one_name_and_other_windows_are_kept_apart(tmp_path: Path) -> None:
    few, many = sweep(tmp_path / "few" / "s"), sweep(tmp_path / "many" / "s", lambda results: results.update(windows=9))
    gathered = gather([few, many], tmp_path / "r.html")
    assert [one.name for one in gathered.comparisons] == [f"s ({few})", f"s ({many})"]
    ladders = [flops_figure(made, "quality") for made in (gathered.comparisons, gathered.comparisons[:1])]
    lines = [figure.svg.count("stroke-width: 1.4") for figure in ladders if figure is not None]
    assert lines == [2, 1], "a line for the dense models of each set of windows"
    figure = context_figure(gathered.comparisons)
    assert figure is not None and "of different numbers of windows" in figure.caption


def test_the_searched_curve_stands_out() -> None:
    results = made_results.example(search=True)
    results["arms"][3] |= {"name": "searched", "schedule": "knots"}
    figure = keep_figure(Comparison(results))
    assert figure is not None and ">searched</text>" in figure.svg and "thick line" in figure.caption
    assert figure.svg.count("stroke-width: 3.2") >= 2


def test_importance_comes_from_the_study_of_these_trials(tmp_path: Path) -> None:
    """drop_0 decides the value; another study of the folder, whose values differ, would say drop_1."""
    results = made_results.example(search=True)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    uniform = optuna.distributions.FloatDistribution(0.1, 1.0)
    for name, decides in (("search-old", "drop_1"), ("search-new", "drop_0")):
        study = optuna.create_study(storage=storage, study_name=name)
        for n in range(20):
            params = {"drop_0": 0.1 + 0.9 * ((7 * n) % 20) / 20, "drop_1": 0.1 + 0.9 * ((3 * n) % 20) / 20}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=dict.fromkeys(params, uniform), value=params[decides]
                )
            )
    results["search"]["trials"] = [
        {"number": t.number, "value": t.value, "keep_counts": None, "state": "COMPLETE"} for t in study.trials
    ]
    shares = search_shares(Comparison(results, folder=tmp_path))
    assert min(shares["drop_0"]) > 0.9 > 0.1 > max(shares["drop_1"])
    (tmp_path / "study.db").write_bytes(b"not a database")
    assert search_shares(Comparison(results, folder=tmp_path)) == {}


def test_commands_lead_from_the_commit_to_the_page() -> None:
    results = made_results.example()
    results["environment"]["commit"] = "abc123+changes"
    results["config"]["folder"] = "runs/here and there"
    trainings = {"runs/base": {"command": "__main__.py fit --config experiments/base.yaml"}}
    assert reproduction(Comparison(results, trainings=trainings)).splitlines() == [
        "git checkout abc123",
        "# the code differed from that commit; the difference is not recorded",
        "pip install -r requirements.lock -e .",
        "pip install --no-deps -r requirements-data.lock",
        "simba-lab fit --config experiments/base.yaml",
        results["command"],
        "simba-lab report 'runs/here and there'",
    ]
