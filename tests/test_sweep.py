"""Sweeps: planned at one budget, run to the end, interrupted and continued, and what they refuse to report."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import tiny
import torch

import simba_lab
from simba_lab.checkpoint import save_model
from simba_lab.errors import InputError
from simba_lab.evaluate import windows as window_scoring
from simba_lab.pruning import KeepSchedule
from simba_lab.sweep import SweepConfig, read_sweep, run_sweep
from simba_lab.sweep.plan import SweepPlan, make_plan
from simba_lab.sweep.study import open_study, sampler
from simba_lab.training import read_experiment
from simba_lab.training.folder import only_one

NAMES = [
    "small", "shorter_context", "dense", "linear:global_impact",
    "highway_top(from_layer=1):random", "highway_top(from_layer=1):random(seed=1)",
]  # fmt: skip
TOP = set(
    "name created command budget_flops tolerance budget_reference convention metric protocol n_context n_suffix "
    "far_distance windows documents far_tokens statistics environment config conclusion arms".split()
)
ARM = set(
    "name kind criterion schedule matched flops quality quality_far quality_interval quality_far_interval difference "
    "difference_interval p_value difference_far difference_far_interval p_value_far windows wall_seconds run "
    "keep_counts mean_keep final_keep by_distance flops_by_op spec".split()
)
CONCLUSION = {"sentence", "best", "not_separable", "far_sentence", "best_far", "not_separable_far"}
SEARCH_ONLY = {
    "windows": 6,
    "budget": {"reference": "first", "tolerance": 0.01},
    "arms": [
        {
            "name": "first", "criterion": "norm",
            "schedule": {"class_path": "linear", "init_args": {"final_keep": 0.2}},
        }
    ],
    "search": {"criterion": "norm", "trials": 10, "windows": 4, "n_values": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def run(config: SweepConfig, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Results of a sweep that runs in this process, without its report."""
    return json.loads(run_sweep("tiny", config, say).read_text())


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what a clock or the place on disk decides."""
    kept = {key: value for key, value in results.items() if key not in ("created", "command", "config")}
    kept["arms"] = [{key: value for key, value in arm.items() if key != "wall_seconds"} for arm in results["arms"]]
    return kept


def planned(lab: tiny.Lab, config: SweepConfig) -> SweepPlan:
    others = {arm.experiment: read_experiment(Path(arm.experiment)) for arm in config.arms if arm.experiment}
    return make_plan(config, read_experiment(Path(config.experiment)), others)


@pytest.fixture(scope="module")
def finished(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sweep file, folder) of a sweep that the command has run to the end."""
    file = lab.sweep(tmp_path_factory.mktemp("sweep") / "tiny.yaml")
    assert tiny.simba_lab("sweep", "--config", file, "--json", file.with_suffix(".json")) == 0
    return file, file.with_suffix("")


def results_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def trials_in(folder: Path, study: str = "arms") -> list[Any]:
    return optuna.load_study(study_name=study, storage=f"sqlite:///{folder / 'study.db'}").trials


def written_at(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("arms/*/arm.json")}


def test_a_plan_names_every_arm_and_brings_it_to_the_budget(lab: tiny.Lab, tmp_path: Path) -> None:
    plan = planned(lab, lab.sweep_config(tmp_path / "s.yaml"))
    assert [arm.name for arm in plan.arms] == NAMES
    assert plan.budget.flops == plan.arms[0].arm.flops < plan.arms[2].arm.flops
    assert [arm.matched for arm in plan.arms] == [True, True, False, True, True, True]
    for arm in plan.arms:
        if arm.matched:
            assert abs(arm.arm.flops / plan.budget.flops - 1) <= 0.01
    assert plan.reach == plan.arms[1].arm.n_context < tiny.N_CONTEXT
    assert [arm.plan.criterion.seed for arm in plan.arms[4:]] == [0, 1]
    assert [experiment.path.name for experiment in plan.experiments] == ["small.yaml", "base.yaml"]


def test_names_show_every_option_that_was_set(lab: tiny.Lab, tmp_path: Path) -> None:
    arms = [
        {
            "criterion": {"class_path": "global_impact", "init_args": {"reduce": "l2", "gated": False}},
            "schedule": ["geometric", {"class_path": "uniform", "init_args": {"multiple_of": 4}}],
            "protect_recent": 0.25,
        },
        {
            "criterion": {
                "class_path": "blocks", "init_args": {"criterion": {"class_path": "random", "init_args": {"seed": 2}}},
            },
            "schedule": "linear", "convolution": "adjacent",
        },
        {"kind": "dense", "name": "whole"},
    ]
    config = lab.sweep_config(tmp_path / "s.yaml", {"arms": arms, "budget": {"flops": 3_000_000, "tolerance": 0.1}})
    assert [arm.name for arm in planned(lab, config).arms] == [
        "geometric:global_impact(reduce=l2)+recent(0.25)",
        "uniform(multiple_of=4):global_impact(reduce=l2)+recent(0.25)",
        "linear:blocks(criterion=random(seed=2))+adjacent",
        "whole",
    ]


def test_a_value_of_the_file_is_overruled_where_it_stands(lab: tiny.Lab, tmp_path: Path) -> None:
    file = lab.sweep(tmp_path / "s.yaml")
    config = read_sweep(file, ["arms.0.experiment=other.yaml", "arms.3.protect_recent=0.5", "budget.tolerance=0.02"])
    given = read_sweep(file)
    assert (config.arms[0].experiment, config.arms[3].protect_recent) == ("other.yaml", 0.5)
    assert config.arms[1:3] == given.arms[1:3] and config.budget.tolerance == 0.02


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        ([{"kind": "dense"}, {"kind": "dense"}], "'dense' is used twice"),
        ([{"name": "x", "schedule": ["linear", "uniform"], "criterion": "norm"}], "'x' stands for 2 arms"),
        ([{"schedule": "linear"}], "needs criterion and schedule"),
        ([{"kind": "dense", "criterion": "norm"}], "a dense arm takes no criterion"),
        ([{"kind": "dense", "criterion": {"class_path": "norm"}}], "a dense arm takes no criterion"),
        ([{"kind": "shorter_context", "schedule": ["linear"]}], "a shorter_context arm takes no criterion"),
        ([{"kind": "dense", "convolution": "adjacent"}], "protect_recent or convolution"),
        ([{"kind": "smaller_dense"}], "smaller_dense needs experiment"),
        ([{"schedule": "linear", "criterion": "norm", "name": "first"}], "first must set final_keep"),
        ([{"kind": "dense"}], "no arm is called 'first'"),
    ],
)
def test_arms_that_make_no_sense_are_refused(lab: tiny.Lab, tmp_path: Path, arms: list[Any], problem: str) -> None:
    changes = {"arms": arms, "budget.reference": "first"}
    with pytest.raises(InputError, match=re.escape(problem)):
        planned(lab, lab.sweep_config(tmp_path / "s.yaml", changes))


def test_a_budget_that_cannot_be_met_exits_3_before_anything_exists(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = lab.experiment(tmp_path / "untrained.yaml")
    changes = {"experiment": str(experiment), "budget": {"flops": 1_500_000}, "search": {"trials": 2}}
    file = lab.sweep(tmp_path / "s.yaml", changes)
    assert tiny.simba_lab("sweep", "--config", file, "--json", tmp_path / "s.json") == 3
    lines = capsys.readouterr().err.splitlines()
    assert "cannot meet the budget 1,500,000 FLOPs" in lines[0] and "nothing has run" in lines[0]
    matched = [name for name in NAMES if name != "dense"]
    assert len(lines) == 1 + len(matched)
    assert [name for name in matched if not any(line.startswith(f"  {name}: ") for line in lines)] == []
    for line in lines[1:]:
        assert re.search(r"costs [\d,]+ FLOPs, [\d.e+]+ % (above|below) the budget; (NOT MATCHED|matched)", line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.yaml", "untrained.yaml"]


def test_results_hold_exactly_the_documented_keys(finished: tuple[Path, Path]) -> None:
    file, folder = finished
    results = results_in(folder)
    assert results.keys() == TOP and results["conclusion"].keys() == CONCLUSION
    assert all(arm.keys() == ARM for arm in results["arms"])
    assert all(row.keys() == {"low", "high", "tokens", "nll"} for arm in results["arms"] for row in arm["by_distance"])
    assert json.loads(file.with_suffix(".json").read_text()) == results
    assert all(isinstance(value, str) for value in results["environment"].values())
    assert results["config"]["arms"][0]["name"] == "small" and results["config"]["batch_size"] == 4


def test_a_finished_sweep_says_what_it_measured(lab: tiny.Lab, finished: tuple[Path, Path]) -> None:
    file, folder = finished
    results = results_in(folder)
    budget, plan = results["budget_flops"], planned(lab, lab.sweep_config(file.with_name("again.yaml")))
    windows = read_experiment(lab.folder / "base.yaml").data.eval_windows("test", tiny.N_CONTEXT, tiny.N_SUFFIX, 12)
    assert (results["windows"], results["far_distance"], results["protocol"]) == (12, plan.reach, "suffix")
    for arm, wanted in zip(results["arms"], plan.arms, strict=True):
        nll = np.load(folder / arm["run"] / "nll.npy")
        assert arm["quality"] == pytest.approx(nll.mean(dtype=np.float64)) and nll.shape == (12, tiny.N_SUFFIX)
        assert arm["flops"] == sum(arm["flops_by_op"].values()) == wanted.arm.flops
        assert abs(arm["flops"] / budget - 1) <= 0.01 or arm["name"] == "dense"
        assert arm["keep_counts"] == wanted.arm.keep_counts == sorted(arm["keep_counts"], reverse=True)
        weights = simba_lab.load(wanted.experiment.folder).with_pruning(wanted.plan)
        again = window_scoring.score_windows(weights, windows, 4, wanted.arm.n_context)
        np.testing.assert_array_equal(again.nll, nll)


def test_every_arm_is_compared_with_the_first(finished: tuple[Path, Path]) -> None:
    first, *others = results_in(finished[1])["arms"]
    assert first["name"] == "small" and first["difference"] is first["p_value"] is first["difference_interval"] is None
    for arm in others:
        assert arm["difference"] == pytest.approx(arm["quality"] - first["quality"], abs=1e-9)
        assert arm["difference_interval"][0] <= arm["difference"] <= arm["difference_interval"][1]
        assert 0 < arm["p_value"] <= 1


def test_the_page_and_the_table_show_every_arm(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    monkeypatch.setenv("COLUMNS", "200")
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert tiny.simba_lab("report", folder) == 0
    printed = capsys.readouterr().out
    assert (folder / "report.html").read_text() == page
    assert [name for name in NAMES if name not in page or name not in printed] == []


def test_a_second_run_measures_nothing(lab: tiny.Lab, finished: tuple[Path, Path]) -> None:
    file, folder = finished
    before, trials, results = written_at(folder), trials_in(folder), results_in(folder)
    assert len(before) == len(trials) == len(NAMES)
    again = run(lab.sweep_config(file))
    assert written_at(folder) == before and len(trials_in(folder)) == len(trials)
    assert comparable(again) == comparable(results) and [a["wall_seconds"] for a in again["arms"]] == [
        a["wall_seconds"] for a in results["arms"]
    ]


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, call: int) -> None:
    """Ctrl-C arrives after the first batch of the ``call``-th measurement."""
    calls = iter(range(1, 1000))

    def score_windows(model: Any, windows: Any, size: int, n_context: int | None = None, progress: Any = None) -> Any:
        def stop(done: int) -> None:
            progress(done)
            raise KeyboardInterrupt

        told = stop if next(calls) == call else progress
        return window_scoring.score_windows(model, windows, size, n_context, told)

    monkeypatch.setattr(f"simba_lab.sweep.{where}.score_windows", score_windows)


def test_an_interrupted_sweep_continues_as_if_it_had_not_been(
    lab: tiny.Lab, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = lab.sweep(tmp_path / "tiny.yaml"), tmp_path / "tiny"
    with monkeypatch.context() as patch:
        interrupt(patch, "measure", 3)
        assert tiny.simba_lab("sweep", "--config", file) == 130
    done = written_at(folder)
    assert len(done) == 2 and not (folder / "results.json").exists()
    assert [trial.state.name for trial in trials_in(folder)] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert trials_in(folder)[2].user_attrs["error"].startswith("KeyboardInterrupt")
    results = run(lab.sweep_config(file))
    assert written_at(folder).items() >= done.items()
    assert comparable(results) == comparable(results_in(finished[1]))
    complete = [trial.params["arm"] for trial in trials_in(folder) if trial.state.name == "COMPLETE"]
    assert complete == NAMES


def test_a_trial_that_a_killed_process_left_running_is_marked_failed(tmp_path: Path) -> None:
    study = open_study(tmp_path, "arms")
    finished, running = study.ask(), study.ask()
    study.tell(finished, 1.5)
    states = [trial.state.name for trial in open_study(tmp_path, "arms").trials]
    assert states == ["COMPLETE", "FAIL"] and running.number == 1


@pytest.fixture
def copied(lab: tiny.Lab, tmp_path: Path) -> tiny.Lab:
    """The lab with run folders of its own, which a test may spoil."""
    shutil.copytree(lab.folder / "runs", tmp_path / "runs")
    copy = tiny.Lab(tmp_path, lab.text, lab.cache)
    copy.experiment(tmp_path / "base.yaml")
    copy.experiment(tmp_path / "small.yaml", {"model.model.d_model": 18})
    return copy


def test_arms_are_measured_again_when_their_weights_have_changed(copied: tiny.Lab) -> None:
    config = copied.sweep_config(copied.folder / "tiny.yaml", {"arms": tiny.SWEEP["arms"][:4]})
    before, times = run(config), written_at(copied.folder / "tiny")
    weights = simba_lab.load(copied.run)
    weights.backbone.norm_f.weight.data.mul_(1.5)
    save_model(copied.run, weights)
    after = run(config)
    pairs = list(zip(before["arms"], after["arms"], strict=True))
    assert [old["quality"] == new["quality"] for old, new in pairs] == [True, False, False, False]
    kept = [name for name, time in written_at(copied.folder / "tiny").items() if time == times[name]]
    assert len(kept) == 1 and kept[0].startswith("small")


def test_a_changed_measurement_is_refused_by_name(
    lab: tiny.Lab, finished: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished[1], tmp_path / "tiny")
    (file,) = (tmp_path / "tiny").glob("arms/linear-global_impact-*/nll.npy")
    nll = np.load(file)
    nll[3, 2] -= 1e-3
    np.save(file, nll)
    assert f"{file} is not what arm.json says" in tiny.mistake(
        capsys, "sweep", "--config", lab.sweep(tmp_path / "tiny.yaml")
    )


@pytest.mark.parametrize("file", ["nll.npy", "arm.json"])
def test_an_arm_whose_files_are_incomplete_is_measured_again(
    lab: tiny.Lab, finished: tuple[Path, Path], tmp_path: Path, file: str
) -> None:
    """And the arms behind it do not count in the time that is said to be left."""
    shutil.copytree(finished[1], tmp_path / "tiny")
    (damaged,) = (tmp_path / "tiny").glob(f"arms/dense-*/{file}")
    damaged.write_bytes(damaged.read_bytes()[:40])
    before, lines = written_at(tmp_path / "tiny"), []
    results = run(lab.sweep_config(tmp_path / "tiny.yaml"), lines.append)
    assert comparable(results) == comparable(results_in(finished[1]))
    changed = [name for name, time in written_at(tmp_path / "tiny").items() if time != before[name]]
    assert changed == [damaged.parent.name]
    (line,) = (line for line in lines if line.startswith("dense: "))
    assert "(100%, 0:00 left, " in line


class Fickle(KeepSchedule):
    """A user's schedule that breaks the rules: its curve depends on something outside its arguments."""

    knob = "keep"
    share = 1.0

    def __init__(self, keep: float | None = None) -> None:
        self.keep = keep

    def shares(self, n_layers: int) -> list[float]:
        return [1.0] + [self.keep * Fickle.share] * (n_layers - 1)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_counts_that_change_after_the_plan_are_refused(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Even when what ran is still within the tolerance, which 0.98 is: it is not what was planned."""
    arms = [tiny.SWEEP["arms"][0], {"name": "fickle", "criterion": "norm", "schedule": f"{__name__}.Fickle"}]
    file = lab.sweep(tmp_path / "tiny.yaml", {"arms": arms, "budget.tolerance": 0.05})

    def score_windows(*args: Any) -> Any:
        Fickle.share = share
        return window_scoring.score_windows(*args)

    monkeypatch.setattr(Fickle, "share", 1.0)
    monkeypatch.setattr("simba_lab.sweep.measure.score_windows", score_windows)
    assert tiny.simba_lab("sweep", "--config", file) == 3
    error = capsys.readouterr().err
    assert "1 of 2 arms did not keep to the budget" in error and "fickle: ran" in error and "were planned" in error
    assert not (tmp_path / "tiny" / "results.json").exists()


def done_trials(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in results["search"]["trials"] if row["state"] == "COMPLETE"]
    return [{key: value for key, value in row.items() if key != "number"} for row in rows]


def test_a_search_stays_within_the_budget_and_continues_without_repeating(
    lab: tiny.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(lab.sweep_config(tmp_path / "whole.yaml", SEARCH_ONLY))
    trials = whole["search"]["trials"]
    assert whole.keys() == TOP | {"search"} and [row["state"] for row in trials] == ["COMPLETE"] * 10
    assert all(abs(row["flops"] / whole["budget_flops"] - 1) <= 0.01 for row in trials)
    assert len({tuple(row["knots"]) for row in trials}) == 10
    best = min(trials, key=lambda row: row["value"])
    assert whole["search"]["best"] == best["number"] and whole["search"]["split"] == "validation"
    searched = whole["arms"][-1]
    assert searched["name"] == "searched" and searched["keep_counts"] == best["keep_counts"]
    assert searched["spec"]["pruning"]["schedule"]["init_args"]["values"] == best["knots"]

    for call in (2, 8):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, "search", call)
            run(lab.sweep_config(tmp_path / "parts.yaml", SEARCH_ONLY))
    parts = run(lab.sweep_config(tmp_path / "parts.yaml", SEARCH_ONLY))
    states = [row["state"] for row in parts["search"]["trials"]]
    assert (states.count("COMPLETE"), states.count("FAIL"), len(states)) == (10, 2, 12)
    assert done_trials(parts) == done_trials(whole)
    assert {key: value for key, value in comparable(parts).items() if key != "search"} == {
        key: value for key, value in comparable(whole).items() if key != "search"
    }

    more = run(lab.sweep_config(tmp_path / "whole.yaml", SEARCH_ONLY | {"search.trials": 11}))
    assert done_trials(more)[:10] == done_trials(whole) and len(more["search"]["trials"]) == 11
    studies = optuna.get_all_study_names(storage=f"sqlite:///{tmp_path / 'whole' / 'study.db'}")
    assert len(studies) == 2, "more trials go on in the same study"


def test_two_sweeps_in_one_folder_are_refused(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_one(tmp_path / "tiny"):
        message = tiny.mistake(capsys, "sweep", "--config", lab.sweep(tmp_path / "tiny.yaml"))
    assert f"folder: another sweep is running in {tmp_path / 'tiny'}" in message


def test_a_run_folder_of_another_experiment_is_refused(copied: tiny.Lab, capsys: pytest.CaptureFixture[str]) -> None:
    copied.experiment(copied.folder / "base.yaml", {"model.model.d_state": 5})
    file = copied.sweep(copied.folder / "tiny.yaml", {"arms": tiny.SWEEP["arms"][:3], "budget.tolerance": 0.2})
    assert "another model.model.d_state than" in tiny.mistake(capsys, "sweep", "--config", file)


def test_the_face_of_far_tokens_may_be_empty(lab: tiny.Lab, tmp_path: Path) -> None:
    """With the dense model's own cost as budget the shorter context is not shorter, and no token is far."""
    arms = [{"kind": "dense", "name": "d"}, {"kind": "shorter_context"}, {"schedule": "linear", "criterion": "norm"}]
    results = run(lab.sweep_config(tmp_path / "s.yaml", {"arms": arms, "budget.reference": "d"}))
    assert (results["far_tokens"], results["far_distance"]) == (0, tiny.N_CONTEXT)
    assert results["conclusion"]["best_far"] is None and all(arm["quality_far"] is None for arm in results["arms"])


def test_arms_are_measured_in_the_dtype_and_on_the_device_asked_for(lab: tiny.Lab, tmp_path: Path) -> None:
    changes = {"arms": [{"kind": "dense", "name": "d"}], "budget": {"reference": "d"}, "windows": 4}
    (wide,) = run(lab.sweep_config(tmp_path / "s.yaml", changes))["arms"]
    (half,) = run(lab.sweep_config(tmp_path / "s.yaml", changes | {"dtype": "bf16", "device": "cpu"}))["arms"]
    assert 0 < abs(half["quality"] - wide["quality"]) < 0.05
    (kept,) = (json.loads(path.read_text()) for path in (tmp_path / "s").glob("arms/*/arm.json"))
    assert (kept["dtype"], kept["device"], half["run"]) == ("bf16", "cpu", wide["run"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there to be used")
def test_a_device_that_is_not_here_is_refused_before_training(lab: tiny.Lab, tmp_path: Path) -> None:
    experiment = lab.experiment(tmp_path / "new.yaml")
    config = lab.sweep_config(tmp_path / "s.yaml", {"experiment": str(experiment), "device": "cuda:0"})
    with pytest.raises(InputError, match="sees no CUDA device here; use cpu or auto, not cuda:0"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_trained_first(lab: tiny.Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment = lab.experiment(tmp_path / "new.yaml", {"trainer.max_steps": 2})
    changes = {"experiment": str(experiment), "arms": [{"kind": "dense", "name": "d"}], "budget": {"reference": "d"}}
    config = lab.sweep_config(tmp_path / "s.yaml", changes | {"windows": 4})
    results = run(config)
    assert results["arms"][0]["windows"] == 4
    assert json.loads((tmp_path / "runs" / "new" / "run.json").read_text())["status"] == "done"
    assert "run folder:" in capfd.readouterr().out
    run(config)
    assert "run folder:" not in capfd.readouterr().out


@pytest.mark.parametrize("seed", [0, 10**6, 10**12])
def test_a_search_may_have_any_seed(seed: int) -> None:
    """Optuna's own must fit into 32 bits."""
    study = optuna.create_study(sampler=sampler(seed, 3))
    assert 0 <= study.ask().suggest_float("height", 0, 1) <= 1


def test_a_full_disk_is_no_lost_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a database says that cannot grow is told at once; one that does not answer is asked again."""
    from sqlalchemy.exc import OperationalError

    from simba_lab.sweep.study import patiently

    def full() -> None:
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr("simba_lab.sweep.study.time.sleep", lambda seconds: pytest.fail("waited for a full disk"))
    with pytest.raises(OperationalError, match="full"):
        patiently(full)
    asked = []
    monkeypatch.setattr("simba_lab.sweep.study.time.sleep", asked.append)
    answers = iter([OperationalError("SELECT", {}, sqlite3.OperationalError("database is locked")), None])

    def locked_once() -> str:
        if (answer := next(answers)) is not None:
            raise answer
        return "here"

    assert patiently(locked_once) == "here" and asked == [0.5]
