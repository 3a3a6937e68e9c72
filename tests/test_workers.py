"""Many at work on one study: nothing lost, nothing doubled, whoever dies, and the numbers of a lone worker.

The order in which parallel workers finish is not fixed, and TPE's suggestions depend on what has finished; what must be
equal to the serial run is therefore tested on an enumerated set of tasks, whose values depend on the task alone.
"""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
import tiny
from processes import comparable

from simba_lab.environment import without_passwords
from simba_lab.errors import InputError
from simba_lab.sweep.children import shares
from simba_lab.sweep.parallel import _wants_more_devices
from simba_lab.sweep.pool import Pool
from simba_lab.sweep.queue import CLAIM, ERROR, TASK, GivenBack, Queue, Task, TaskFailed
from simba_lab.sweep.study import SharedStorage, local_storage, named_study
from simba_lab.training import Experiment

FORK = multiprocessing.get_context("fork")
COUNT = 200


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    made = postgres.server()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def tasks(count: int) -> list[Task]:
    return [Task(f"key-{i}", f"task {i}", {"x": float(i)}) for i in range(count)]


def value_at(x: float) -> float:
    return (x - 70.25) ** 2


def short_trial(trial: optuna.Trial, task: Task) -> float:
    x = trial.suggest_float("x", 0.0, 1e6)
    time.sleep(random.Random(x).uniform(0, 0.02))
    return value_at(x)


def work(
    url: str, count: int, run: Callable[[optuna.Trial, Task], float] = short_trial, patience: int = 1
) -> dict[str, str]:  # fmt: skip
    """One process at the shared study, as one of many; returns what failed.

    ``patience``: seconds between signs of life. At one, a process that a busy machine stalls for four seconds passes
    for dead and its trial is run again, as it must be; where nobody dies and no trial may fail, be more patient.
    """
    storage = SharedStorage(url, heartbeat=patience).open()
    queue = Queue(
        lambda: named_study(storage, "shared"), tasks(count), place=os.getpid() * 37, poll=0.1, grace=4.0 * patience
    )
    queue.work(run, threading.Event())
    return queue.failed


def join(
    url: str, count: int, run: Callable[[optuna.Trial, Task], float] = short_trial, patience: int = 1
) -> Any:  # fmt: skip
    process = FORK.Process(target=work, args=(url, count, run, patience), daemon=True)
    process.start()
    return process


def study_of(url: str) -> optuna.Study:
    return optuna.load_study(study_name="shared", storage=url)


def complete(study: optuna.Study) -> collections.Counter[str]:
    return collections.Counter(trial.user_attrs[TASK] for trial in study.trials if trial.state.name == "COMPLETE")


def assert_all_done_once(study: optuna.Study, count: int) -> None:
    assert complete(study) == {f"key-{i}": 1 for i in range(count)}
    assert not [trial for trial in study.trials if not trial.state.is_finished()]
    assert study.best_value == min(value_at(i) for i in range(count)) and study.best_params == {"x": 70.0}


@pytest.mark.slow
def test_eight_workers_do_two_hundred_trials_once(server: postgres.Server) -> None:
    url = server.database("eight")
    processes = [join(url, COUNT, patience=20) for _ in range(8)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 8
    study = study_of(url)
    assert_all_done_once(study, COUNT)
    claims = {trial.user_attrs["claim"]["process"] for trial in study.trials if "claim" in trial.user_attrs}
    assert len(claims) > 1 and not [trial for trial in study.trials if trial.state.name == "FAIL"]


def slow_trial(trial: optuna.Trial, task: Task) -> float:
    time.sleep(0.3)
    return value_at(trial.suggest_float("x", 0.0, 1e6))


def one_at_work(server: postgres.Server, database: str, processes: list[Any], rng: random.Random) -> Any:
    """A process in the middle of a trial: on a slow machine one taken blindly is as likely between two."""
    claims = (
        "SELECT value_json FROM trial_user_attributes JOIN trials USING (trial_id)"
        f" WHERE key = '{CLAIM}' AND state = 'RUNNING'"
    )
    for _ in range(1000):
        at_work = {json.loads(value)["process"] for (value,) in server.sql(database, claims)}
        if found := [process for process in processes if process.pid in at_work]:
            return rng.choice(found)
        time.sleep(0.02)
    raise TimeoutError("nobody is at work")


@pytest.mark.slow
def test_trials_of_killed_workers_and_cut_connections_are_run_again(server: postgres.Server) -> None:
    """Seeded kill -9 of workers, and the loss of all connections, in the middle of 80 trials."""
    url, rng = server.database("killed"), random.Random(7)
    named_study(SharedStorage(url).open(), "shared")
    processes = [join(url, 80, slow_trial) for _ in range(4)]
    for number, event in enumerate(("kill", "cut", "kill", "cut", "kill")):
        while server.sql("killed", "SELECT count(*) FROM trials WHERE state = 'COMPLETE'")[0][0] < 10 * number + 4:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.3))
        if event == "cut":
            assert server.cut_connections("killed") > 0
            continue
        victim = one_at_work(server, "killed", processes, rng)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        processes.remove(victim)
        processes.append(join(url, 80, slow_trial))
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * 4
    study = study_of(url)
    assert_all_done_once(study, 80)
    assert sum(trial.state.name == "FAIL" for trial in study.trials) >= 1


def test_a_trial_taken_by_a_process_that_never_announced_itself_is_found(server: postgres.Server) -> None:
    """Optuna's heartbeat does not know it: the process died between taking the trial and its first sign of life."""
    url = server.database("silent")
    study = named_study(SharedStorage(url, 1).open(), "shared")
    study.enqueue_trial({"x": 0.0}, user_attrs={TASK: "key-0"})
    study.ask()
    assert work(url, 3) == {}
    assert set(complete(study)) == {"key-0", "key-1", "key-2"}


def failing(trial: optuna.Trial, task: Task) -> float:
    if task.key == "key-1":
        raise TaskFailed("the criterion divides by zero")
    return short_trial(trial, task)


@pytest.mark.parametrize("told_by_others", [False, True])
def test_a_result_that_the_database_did_not_hear_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told_by_others: bool
) -> None:
    """The connection goes in the moment of telling; meanwhile the trial may have passed for dead."""
    tell, lost = optuna.storages.RDBStorage.set_trial_state_values, []

    def cut(self: Any, trial_id: int, state: Any, values: Any = None) -> bool:
        if state.name == "COMPLETE" and not lost:
            lost.append(trial_id)
            if told_by_others:
                tell(self, trial_id, optuna.trial.TrialState.FAIL)
            raise optuna.exceptions.StorageInternalError("the connection was closed")
        return tell(self, trial_id, state, values)

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", cut)
    queue = Queue(lambda: named_study(local_storage(tmp_path), "shared"), tasks(3), poll=0.05)
    queue.work(short_trial, threading.Event())
    trials = named_study(local_storage(tmp_path), "shared").trials
    assert len(lost) == 1 and queue.failed == {}
    assert complete(named_study(local_storage(tmp_path), "shared")) == {f"key-{i}": 1 for i in range(3)}
    assert sum(trial.state.name == "FAIL" for trial in trials) == int(told_by_others)


def test_a_trial_that_fails_by_itself_is_recorded_and_left(tmp_path: Path) -> None:
    storage = local_storage(tmp_path)
    for attempt in (1, 2):
        queue = Queue(lambda: named_study(storage, "shared"), tasks(3), poll=0.05)
        threads = [threading.Thread(target=queue.work, args=(failing, threading.Event())) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        trials = named_study(storage, "shared").trials
        failed = [trial for trial in trials if trial.user_attrs.get(TASK) == "key-1" and trial.state.name == "FAIL"]
        assert [trial.user_attrs[ERROR] for trial in failed] == ["the criterion divides by zero"] * attempt
        assert queue.failed == {"key-1": "the criterion divides by zero"}
        assert complete(named_study(storage, "shared")) == {"key-0": 1, "key-2": 1}
    repaired = Queue(lambda: named_study(storage, "shared"), tasks(3))
    repaired.work(short_trial, threading.Event())
    assert repaired.failed == {} and complete(named_study(storage, "shared"))["key-1"] == 1


def test_a_trial_whose_processes_keep_dying_is_given_up(tmp_path: Path) -> None:
    def lost(trial: optuna.Trial, task: Task) -> float:
        if task.key == "key-0":
            raise GivenBack
        return short_trial(trial, task)

    queue = Queue(lambda: named_study(local_storage(tmp_path), "shared"), tasks(2))
    queue.work(lost, threading.Event())
    assert queue.failed == {"key-0": "lost 7 times with the process that ran it"}


def test_a_task_that_two_hosts_enter_at_once_is_run_once(tmp_path: Path) -> None:
    study = named_study(local_storage(tmp_path), "shared")
    for _ in range(2):
        study.enqueue_trial({"x": 0.0}, user_attrs={TASK: "key-0"})
    runs: list[int] = []

    def run(trial: optuna.Trial, task: Task) -> float:
        runs.append(trial.number)
        time.sleep(0.5)
        return short_trial(trial, task)

    queue = Queue(lambda: named_study(local_storage(tmp_path), "shared"), tasks(1), poll=0.05)
    threads = [threading.Thread(target=queue.work, args=(run, threading.Event())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs == [0] and [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]


def test_workers_divide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("simba_lab.sweep.children._gpus", lambda: ["GPU-a", "GPU-b"])
    given = [dict(setting.split("=") for setting in settings) for settings in shares(3)]
    assert [worker["OMP_NUM_THREADS"] for worker in given] == ["2", "2", "2"]
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in given] == ["GPU-a", "GPU-b", "GPU-a"]


def test_workers_with_several_gpus_have_them_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simba_lab.sweep.children._gpus", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e"])
    given = [dict(setting.split("=") for setting in settings) for settings in shares(2, 2)]
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in given] == ["GPU-a,GPU-b", "GPU-c,GPU-d"]
    with pytest.raises(InputError, match="--gpus-per-worker: 2 for each of 3 workers makes 6, this host has 5; lower"):
        shares(3, 2)


@pytest.mark.parametrize(
    ("devices", "each", "alone"),
    [(1, None, False), (2, None, True), (2, 2, False), ("2", 2, False), (4, 2, True), ([0, 1], 2, True),
     ("auto", 2, False), ("auto", None, True), (-1, 2, True)],
)  # fmt: skip
def test_who_trains_side_by_side(devices: Any, each: int | None, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    experiment = Experiment(Path("e.yaml"), Path("run"), None, None, {"trainer": {"devices": devices}}, None)
    assert _wants_more_devices(experiment, each) is alone


def test_one_named_gpu_is_no_device_for_several_workers(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lab.sweep(tmp_path / "named.yaml", {"device": "cuda:1"})
    line = tiny.mistake(capsys, "sweep", "--config", file, "--workers", "2")
    assert "device: cuda:1 is one GPU, and every worker has its own; give auto or cuda" in line


def test_more_gpus_than_there_are_is_a_mistake(
    lab: tiny.Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("simba_lab.sweep.children._gpus", lambda: ["GPU-a"])
    file = lab.sweep(tmp_path / "wide.yaml")
    line = tiny.mistake(capsys, "sweep", "--config", file, "--workers", "2", "--gpus-per-worker", "2")
    assert "--gpus-per-worker: 2 for each of 2 workers makes 4, this host has 1; lower it or --workers" in line
    assert not (tmp_path / "wide").exists()


@pytest.fixture(scope="module")
def serial(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = lab.sweep(tmp_path_factory.mktemp("serial") / "serial.yaml")
    assert tiny.simba_lab("sweep", "--config", file) == 0
    return file.with_suffix("")


@pytest.mark.slow
def test_two_workers_find_what_one_finds(lab: tiny.Lab, serial: Path, tmp_path: Path) -> None:
    file = lab.sweep(tmp_path / "pair.yaml")
    assert tiny.simba_lab("sweep", "--config", file, "--workers", "2") == 0
    assert comparable(tmp_path / "pair") == comparable(serial)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pair/arms/*/arm.json")}
    assert tiny.simba_lab("sweep", "--config", file, "--workers", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("pair/arms/*/arm.json")} == before


@pytest.mark.slow
def test_two_hosts_share_one_study(lab: tiny.Lab, serial: Path, tmp_path: Path, server: postgres.Server) -> None:
    """Two commands at once, each with its own process tree, on one database and one folder."""
    file, url = lab.sweep(tmp_path / "hosts.yaml"), server.database("hosts")
    command = [sys.executable, "-m", "simba_lab", "sweep", "--config", str(file), "--storage", url, "--heartbeat", "2"]
    hosts = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for host in hosts:
        _, error = host.communicate(timeout=300)
        assert host.returncode == 0, error.decode()
    assert comparable(tmp_path / "hosts") == comparable(serial)
    (name,) = optuna.get_all_study_names(storage=url)
    trials = optuna.load_study(study_name=name, storage=url).trials
    done = [trial.user_attrs[TASK] for trial in trials if trial.state.name == "COMPLETE"]
    assert len(set(done)) == len(done) == len(tiny.SWEEP["arms"]) + 1


@pytest.mark.slow
def test_a_search_by_workers_keeps_to_its_trials_and_its_budget(lab: tiny.Lab, tmp_path: Path) -> None:
    from test_sweep import SEARCH_ONLY

    file = lab.sweep(tmp_path / "found.yaml", SEARCH_ONLY | {"search.trials": 5})
    assert tiny.simba_lab("sweep", "--config", file, "--workers", "2") == 0
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    done = [row for row in results["search"]["trials"] if row["state"] == "COMPLETE"]
    assert sorted(row[TASK] for row in done) == list("01234")
    assert all(abs(row["flops"] / results["budget_flops"] - 1) <= 0.01 for row in done)
    best = min(done, key=lambda row: row["value"])
    assert results["arms"][-1]["name"] == "searched" and results["arms"][-1]["keep_counts"] == best["keep_counts"]


def test_a_worker_that_cannot_do_its_task_says_why(lab: tiny.Lab, tmp_path: Path) -> None:
    config = lab.sweep_config(tmp_path / "s.yaml")
    storage, reasons = local_storage(tmp_path), []

    def ask(slot: Any, trial: optuna.Trial, task: Task) -> float:
        try:
            return slot.ask(trial, {"arm": "nobody", "fingerprint": ""})["value"]
        except TaskFailed as failure:
            reasons.append(str(failure))
            raise

    queue = Queue(lambda: named_study(storage, "shared"), tasks(1))
    Pool(shares(1), config, tmp_path).empty(queue, ask)
    assert len(reasons) == 1 and "StopIteration" in reasons[0] and queue.failed == {"key-0": reasons[0]}


def test_a_database_that_does_not_answer_takes_one_line(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setattr("simba_lab.sweep.study.time.sleep", lambda seconds: None)
    file = lab.sweep(tmp_path / "s.yaml")
    for url in ("postgresql://lab:secret@127.0.0.1:9/none", "nonsense", "marsdb://x/y"):
        error = tiny.mistake(capsys, "sweep", "--config", file, "--storage", url)
        assert "--storage" in error and "secret" not in error
    for flag in ("--workers", "--heartbeat", "--gpus-per-worker"):
        assert f"{flag} must be at least 1" in tiny.mistake(capsys, "sweep", "--config", file, flag, "0")


def test_recorded_commands_hold_no_passwords() -> None:
    line = "simba-lab sweep --storage postgresql://lab:s3cr:et@db.example.org/sweeps --set a=b@c"
    assert without_passwords(line) == "simba-lab sweep --storage postgresql://lab:***@db.example.org/sweeps --set a=b@c"
    with pytest.raises(InputError, match=r"lab:\*\*\*@"):
        SharedStorage("marsdb://lab:s3cret@x/y").open()
