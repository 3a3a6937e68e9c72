"""The ladder's jobs and the runner that spreads them over GPUs, with real processes in place of trainings."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # which the other one imports
    spec.loader.exec_module(found)
    return found


jobs, campaign = module("jobs"), module("campaign")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_what_a_job_needs_is_what_its_files_name() -> None:
    found = jobs.all_jobs()
    assert found["fit-63m"].needs == ()
    assert found["fit-12m-recall"].needs == ("fit-12m-drill", "fit-7m")  # the tokenizer is 7m's
    assert found["pair-mamba2-12m-512"].needs == ("fit-mamba2-12m", "fit-mamba2-6m")
    assert found["search-low-20m"].needs == ("fit-20m",)
    chosen = ("lookahead-63m-choice-512", "lookahead-63m-choice-1024")
    assert found["lookahead-63m-untaught-first-8192"].needs == ("fit-36m", "fit-63m", *chosen)
    assert {need for job in found.values() for need in job.needs} <= set(found)


def test_trainings_from_other_seeds_differ_in_seed_and_folder_alone() -> None:
    found = jobs.all_jobs()
    plain, seeded = found["fit-12m"], found["fit-12m-seed2"]
    changed = ["--seed_everything", "2", "--trainer.default_root_dir", "runs/ladder/12m-seed2"]
    assert seeded.arguments == [*plain.arguments, *changed] and seeded.training and seeded.needs == ()
    compared = found["retrained-12m-seed2-512"]
    assert set(compared.needs) == {"fit-7m-seed2", "fit-12m-seed2"}
    given = dict(pair.split("=") for pair in compared.arguments[4::2])
    assert given["experiment"] == "runs/ladder/12m-seed2/config.yaml"
    assert (given["n_context"], given["windows"], given["budget.tolerance"]) == ("448", "2000", "0.016")
    assert "budget.tolerance=0.016" not in found["retrained-12m-seed2-1024"].arguments


def test_every_sweep_of_the_ladder_can_be_read() -> None:
    campaign.check({name: job for name, job in jobs.all_jobs().items() if job.arguments[0] == "sweep"})


def test_a_wrong_configuration_stops_before_anything_runs() -> None:
    wrong = jobs.sweep("pair-7m-512", "pair_512", {"n_contxt": 448})
    with pytest.raises(SystemExit, match="pair-7m-512: .*n_contxt"):
        campaign.check({"pair-7m-512": wrong})


def test_a_wrong_training_stops_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text((ROOT / "experiments/base.yaml").read_text() + "warmup: 3\n")
    wrong = jobs.Job("fit-x", ["fit", "--config", str(tmp_path / "x.yaml")], tmp_path / "run.json", training=True)
    with pytest.raises(SystemExit, match="fit-x: .*warmup"):
        campaign.check({"fit-x": wrong})


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(SystemExit, match="--gpus 99: this machine has"):
        campaign.places(99)
    assert campaign.places(0) == []


def test_a_pattern_brings_what_its_jobs_need() -> None:
    found = campaign.selected(jobs.all_jobs(), ["search-36m"])
    assert list(found) == ["fit-20m", "fit-36m", "search-36m"]
    found = campaign.selected(jobs.all_jobs(), ["fit-36m", "search-36m", "pair-20m-512", "fit-*"])
    assert list(found)[:5] == ["fit-36m", "fit-20m", "search-36m", "fit-12m", "pair-20m-512"]
    with pytest.raises(SystemExit, match="no job matches 'serch"):
        campaign.selected(jobs.all_jobs(), ["serch-*"])


def test_the_layer_with_the_least_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.65 costs less on plain text, 0.7 finds so much more far away that it wins; later arms do not count."""
    monkeypatch.setattr(jobs, "RUNS", tmp_path)
    plain, far = [3.0, 2.0, 1.0, 1.5, 4.0, -9.0], [0.0, 0.0, 0.0, -10.0, 0.0, -90.0]
    for length in (512, 1024):
        folder = tmp_path / f"sweeps/lookahead-x-choice-{length}"
        folder.mkdir(parents=True)
        arms: list[dict[str, Any]] = [{"kind": "dense", "difference": -99.0}]
        arms += [
            {"criterion": "lookahead_impact", "difference": p, "difference_far": f}
            for p, f in zip(plain, far, strict=True)
        ]
        (folder / "results.json").write_text(json.dumps({"arms": arms}))
    assert jobs.layer_of("x") == 0.7
    job = jobs.Job("x", ["sweep"], tmp_path / "x", choose="x")
    assert job.command()[-2:] == ["--set", "arms.2.criterion.init_args.layer=0.7"]


def test_a_training_that_was_stopped_goes_on(tmp_path: Path) -> None:
    job = jobs.Job("fit-x", ["fit"], tmp_path / "run.json", training=True)
    job.done.write_text('{"status": "stopped"}')
    assert not job.is_done() and job.command()[-1] == "fit"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    assert job.command()[-3:] == ["fit", "--ckpt_path", "last"]
    job.done.write_text('{"status": "done"}')
    assert job.is_done()


# Running them


class Script(jobs.Job):
    """A job whose command notes its GPU, waits for a file if told to, and then is done or fails."""

    def command(self) -> list[str]:
        return ["-c", PROGRAM, str(self.done), *self.arguments]


PROGRAM = """
import json, os, pathlib, signal, sys, time
done, how = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: (done.with_suffix(".saved").touch(), sys.exit(0)))
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this run's own parent ignores it
done.with_suffix(".begun").touch()
while how == "wait" and not done.with_suffix(".go").exists():
    time.sleep(0.01)
if how == "fail":
    sys.exit(3)
if how != "nothing":
    done.write_text(json.dumps({"status": "done", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}))
"""


def script(folder: Path, name: str, how: str = "go", needs: tuple[str, ...] = (), training: bool = False) -> Script:
    return Script(name, [how], folder / f"{name}.json", needs, training)


def until(condition: Any, step: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        step()
        time.sleep(0.01)


GPUS = [["CUDA_VISIBLE_DEVICES=4", "OMP_NUM_THREADS=1"], ["CUDA_VISIBLE_DEVICES=6", "OMP_NUM_THREADS=1"]]


def run(found: list[Script], gpus: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    monkeypatch.setattr(campaign, "LOGS", folder / "logs")
    return campaign.Campaign({job.name: job for job in found}, GPUS[:gpus])


def test_jobs_wait_for_what_they_need_and_share_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (script(tmp_path, f"fit-{n}", "wait", training=True) for n in "abc")
    after = script(tmp_path, "sweep", needs=("fit-a", "fit-b"))
    state = run([first, second, third, after], 2, monkeypatch, tmp_path)
    until(lambda: second.done.with_suffix(".begun").exists() and first.done.with_suffix(".begun").exists(), state.step)
    assert set(state.running) == {"fit-a", "fit-b"}  # one training to a GPU
    first.done.with_suffix(".go").touch()
    until(lambda: "fit-c" in state.running, state.step)
    assert not after.done.exists() and state.running["fit-c"][1] == 0
    for job in (second, third):
        job.done.with_suffix(".go").touch()
    until(lambda: not state.step(), lambda: None)
    assert not state.failed
    assert [json.loads(job.done.read_text())["gpu"] for job in (first, second, third)] == ["4", "6", "4"]
    again = run([first, second, third, after], 2, monkeypatch, tmp_path)
    assert again.waiting == [] and not again.step()


def test_a_failure_costs_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        script(tmp_path, "fit-a", "fail", training=True), script(tmp_path, "fit-b", training=True),
        script(tmp_path, "of-a", needs=("fit-a",)), script(tmp_path, "of-of-a", needs=("of-a",)),
        script(tmp_path, "of-b", needs=("fit-b",)), script(tmp_path, "empty", "nothing"),
    ]  # fmt: skip
    state = run(found, 0, monkeypatch, tmp_path)
    until(lambda: not state.step(), lambda: None)
    assert sorted(state.failed) == ["empty", "fit-a", "of-a", "of-of-a"]  # ending well without a result is a failure
    assert found[4].done.exists()
    assert json.loads(found[1].done.read_text())["gpu"] == os.environ.get("CUDA_VISIBLE_DEVICES")
    printed = capsys.readouterr().out
    assert "fit-a: FAILED, exit code 3" in printed and "of-of-a: FAILED, needs of-a, which failed" in printed


SAID = [("", ""), ("one\n", "one"), ("one\rtwo  9:06 left\r\n\n", "two  9:06 left"), ("a" * 5000, "a" * 120)]


@pytest.mark.parametrize(("text", "last"), SAID)
def test_what_a_log_said_last(text: str, last: str, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text(text)
    assert campaign.last_line(tmp_path / "x.log") == last


def test_what_runs_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = script(tmp_path, "one", "wait")
    state = run([job], 1, monkeypatch, tmp_path)
    state.step()
    (tmp_path / "logs/one.log").write_text("step 3 of 9, 0:12 left\n")
    state.say()
    assert "  one: step 3 of 9, 0:12 left" in capsys.readouterr().out
    job.done.with_suffix(".go").touch()
    until(lambda: not state.step(), lambda: None)


STOPPED = """
import signal, sys, time
sys.path[:0] = [{experiments!r}, {tests!r}]
from pathlib import Path
from test_campaign import campaign, script
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
campaign.LOGS = Path({folder!r}) / "logs"
found = [script(Path({folder!r}), name, "wait") for name in ("one", "two")]
state = campaign.Campaign({{job.name: job for job in found}}, [[]])
try:
    while state.step():
        time.sleep(0.05)
finally:
    state.stop()
"""


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_reaches_every_job_and_waits_for_it(tmp_path: Path, kind: signal.Signals, code: int) -> None:
    """Two signals to all of the group, as `timeout` and a terminal send them; the second must not end the waiting."""
    places = {"experiments": str(ROOT / "experiments"), "tests": str(ROOT / "tests"), "folder": str(tmp_path)}
    program = subprocess.Popen([sys.executable, "-c", STOPPED.format(**places)], start_new_session=True)
    until(lambda: all((tmp_path / f"{name}.begun").exists() for name in ("one", "two")), lambda: None)
    os.killpg(program.pid, kind)
    os.killpg(program.pid, kind)
    assert program.wait(60) == code
    assert all((tmp_path / f"{name}.saved").exists() for name in ("one", "two"))


def test_the_command_lists_and_refuses() -> None:
    program = [sys.executable, "experiments/campaign.py"]
    listed = subprocess.run([*program, "--list", "flow-2?m"], capture_output=True, text=True, check=True).stdout
    assert [line[5:].split()[0] for line in listed.splitlines()] == ["fit-20m", "flow-20m"]
    nothing = subprocess.run(program, capture_output=True, text=True)
    assert nothing.returncode == 2 and "name at least one job" in nothing.stderr
