"""Killed at any moment, the same command finishes, with the numbers it would have had; nothing is left half done.

The kills come at moments drawn from a seed. The short form runs with every test run, the full size with ``make soak``.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest
import tiny
from processes import Command, assert_no_leftovers, assert_same_fit, assert_whole, comparable, trained
from soak import Counted

from simba_lab.training.folder import only_one

LONG = {"trainer.max_steps": 24, "trainer.val_check_interval": 4}
CLOCK = """import itertools, time
_start, _calls = time.time(), itertools.count()
time.time = lambda: _start - 60.0 * next(_calls)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def swept(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a sweep that nothing disturbed measured."""
    file = lab.sweep(tmp_path_factory.mktemp("calm") / "calm.yaml")
    assert tiny.simba_lab("sweep", "--config", file) == 0
    return comparable(file.with_suffix(""))


@pytest.fixture(scope="module")
def fitted(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fit that nothing disturbed left."""
    file = lab.experiment(tmp_path_factory.mktemp("calm") / "long.yaml", LONG)
    assert tiny.simba_lab("fit", "--config", file) == 0
    return trained(file.parent / "runs" / "long")


def untrained(lab: tiny.Lab, folder: Path) -> tiny.Lab:
    """The lab's text with experiments whose runs do not exist yet."""
    made = tiny.Lab(folder, lab.text, lab.cache)
    made.experiment(folder / "base.yaml")
    made.experiment(folder / "small.yaml", {"model.model.d_model": 18})
    return made


def finish(start: Callable[[], Command], tries: int = 3) -> None:
    """The same command again until it ends by itself; an arm that killed several workers is its to try again."""
    for _ in range(tries):
        command = start()
        code = command.wait()
        command.assert_nothing_lives()
        if code == 0:
            return
        assert code == 2 and "workers died of it" in command.said(), command.said()
    raise AssertionError(command.said())


class Storm:
    """Kills of a command at random moments, over as many runs of it as that takes; counts them."""

    def __init__(self, start: Callable[[], Command], watched: Path, seed: int, longest: float) -> None:
        self.start, self.watched, self.rng, self.longest = start, watched, random.Random(seed), longest
        self.counts: Counter[str] = Counter()

    def kill(self, kills: int, descendants: bool, renew: Callable[[], None]) -> None:
        """``renew`` is called when the command finished before the kills were used up: everything begins anew."""
        while self.counts.total() < kills:
            command = self.start()
            self._pass(command, self.longest)
            if command.process.poll() is not None:
                assert command.process.returncode == 0 or "workers died of it" in command.said(), command.said()
                renew()
                continue
            if descendants and self.rng.random() < 0.5 and command.kill_descendant(self.rng):
                self.counts["workers"] += 1
                self._pass(command, 5.0)
            if command.process.poll() is None:
                self.counts["commands"] += 1
            command.kill()
            assert_whole(self.watched)

    def _pass(self, command: Command, longest: float) -> None:
        moment = time.monotonic() + self.rng.uniform(0, longest)
        command.until(lambda: time.monotonic() > moment)


def sweep_storm(lab: tiny.Lab, folder: Path, kills: int, longest: float, *arguments: str) -> tuple[Storm, Path]:
    file, log = lab.sweep(folder / "stormy.yaml"), folder / "log.txt"

    def start() -> Command:
        return Command("sweep", "--config", file, "--workers", "2", *arguments, log=log)

    def renew() -> None:
        for made in (folder / "stormy", folder / "runs"):
            shutil.rmtree(made, ignore_errors=True)

    storm = Storm(start, folder, 5, longest)
    storm.kill(kills, True, renew)
    finish(start)
    return storm, folder / "stormy"


def fit_storm(lab: tiny.Lab, folder: Path, kills: int, longest: float) -> tuple[Storm, Path]:
    file, log, run = lab.experiment(folder / "long.yaml", LONG), folder / "log.txt", folder / "runs" / "long"

    def start() -> Command:
        return Command("fit", "--config", file, "--ckpt_path", "last", log=log)

    storm = Storm(start, folder, 6, longest)
    storm.kill(kills, False, lambda: shutil.rmtree(run))
    finish(start)
    return storm, run


@pytest.mark.slow
def test_a_sweep_survives_kills(lab: tiny.Lab, swept: dict[str, Any], tmp_path: Path) -> None:
    """A worker at its second arm, then the whole command: the arms that stood are kept, the others measured."""
    file, log, rng = lab.sweep(tmp_path / "stormy.yaml"), tmp_path / "log.txt", random.Random(3)
    folder = tmp_path / "stormy"
    command = Command("sweep", "--config", file, "--workers", "2", log=log)
    command.until(lambda: len(command.descendants()) == 2)
    assert command.kill_descendant(rng)
    command.until(lambda: len(list(folder.glob("arms/*/arm.json"))) >= 2)
    command.kill()
    assert_whole(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("arms/*/arm.json")}
    assert before and not (folder / "results.json").exists()
    assert tiny.simba_lab("sweep", "--config", file, "--workers", "2") == 0
    assert comparable(folder) == swept
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_no_leftovers(folder)


@pytest.mark.slow
def test_a_fit_survives_kills_and_sigterm(lab: tiny.Lab, fitted: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 behind the first checkpoint, SIGTERM, which saves its step and ends with 0, then to the end."""
    file, run = lab.experiment(tmp_path / "long.yaml", LONG), tmp_path / "runs" / "long"
    arguments = ("fit", "--config", file, "--ckpt_path", "last")
    checkpoint, metrics = run / "checkpoints" / "last.ckpt", run / "metrics.jsonl"
    command = Command(*arguments, log=tmp_path / "log.txt")
    command.until(checkpoint.is_file)
    command.kill()
    assert_whole(run)
    killed = len(metrics.read_text().splitlines())
    command = Command(*arguments, log=tmp_path / "log.txt")
    command.until(lambda: len(metrics.read_text().splitlines()) > killed + 1)
    command.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert command.wait(30) == 0, command.said()
    assert time.monotonic() - started < 30 and "Traceback" not in command.said()
    assert "stopped by SIGTERM" in command.said()
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert tiny.simba_lab(*arguments) == 0
    assert_same_fit(run, fitted, kills=1)
    assert_no_leftovers(run)


def test_a_fit_killed_behind_its_last_step_is_completed(
    lab: tiny.Lab, fitted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint stands, the weights do not: nothing is left to train, but much to write."""
    file = lab.experiment(tmp_path / "long.yaml", LONG)

    def die(*_: Any) -> None:
        raise RuntimeError("the power goes off")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr("simba_lab.training.record.save_model", die)
        tiny.simba_lab("fit", "--config", file)
    assert tiny.simba_lab("fit", "--config", file, "--ckpt_path", "last") == 0
    assert_same_fit(tmp_path / "runs" / "long", fitted)


@pytest.mark.slow
def test_sigterm_ends_a_sweep_with_zero_and_it_continues(lab: tiny.Lab, swept: dict[str, Any], tmp_path: Path) -> None:
    """While its experiments are being trained: both fits save."""
    made = untrained(lab, tmp_path)
    file = made.sweep(tmp_path / "term.yaml")
    command = Command("sweep", "--config", file, "--workers", "2", log=tmp_path / "log.txt")
    command.until(lambda: any(tmp_path.glob("runs/*/checkpoints/last.ckpt")))
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(30) == 0, command.said()
    assert "stopped by SIGTERM; the same command continues" in command.said() and "Traceback" not in command.said()
    command.assert_nothing_lives()
    assert tiny.simba_lab("sweep", "--config", file, "--workers", "2") == 0
    assert comparable(tmp_path / "term") == swept


def test_a_second_fit_in_a_folder_is_refused_by_name(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = lab.experiment(tmp_path / "one.yaml"), tmp_path / "runs" / "one"
    with only_one(folder, what="fit"):
        error = tiny.mistake(capsys, "fit", "--config", file)
    assert f"trainer.default_root_dir: another fit is running in {folder} (process {os.getpid()} on" in error
    assert not folder.exists(), "nothing was written, so nothing is left"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None] | None]]:
    """(folder on a disk of 200 kB, what a process must call first): a tmpfs for root, else a limit on file sizes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.getuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    yield folder, None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def refused(command: Command) -> str:
    """The one line on which a command ended."""
    assert command.wait() == 2, command.said()
    lines = [line for line in command.said().splitlines() if line.startswith("simba-lab: error: ")]
    assert len(lines) == 1 and "Traceback" not in command.said(), command.said()
    command.assert_nothing_lives()
    return lines[0]


@pytest.mark.slow
def test_a_full_disk_takes_one_line_and_leaves_whole_files(
    lab: tiny.Lab, small_disk: tuple[Path, Callable[[], None] | None], tmp_path: Path
) -> None:
    folder, limit = small_disk
    file = lab.experiment(tmp_path / "full.yaml", {"trainer.default_root_dir": str(folder / "run")})
    line = refused(Command("fit", "--config", file, log=tmp_path / "log.txt", preexec_fn=limit))
    assert "cannot write" in line and "the same command continues" in line
    assert_whole(folder)
    assert_no_leftovers(folder)
    sweep = lab.sweep(tmp_path / "full-sweep.yaml", {"folder": str(folder / "sweep")})
    assert "cannot write" in refused(
        Command("sweep", "--config", sweep, "--workers", "2", log=tmp_path / "log.txt", preexec_fn=limit)
    )
    assert_whole(folder)


def test_a_folder_that_cannot_be_written_to_is_refused(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder should be: refused even to root, whom no permission stops."""
    (tmp_path / "runs").write_text("not a folder")
    file = lab.experiment(tmp_path / "one.yaml")
    assert str(tmp_path / "runs") in tiny.mistake(capsys, "fit", "--config", file)
    sweep = lab.sweep(tmp_path / "s.yaml", {"folder": str(tmp_path / "runs" / "s")})
    assert str(tmp_path / "runs") in tiny.mistake(capsys, "sweep", "--config", sweep)
    if os.getuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o555)
        sweep = lab.sweep(tmp_path / "s.yaml", {"folder": str(tmp_path / "closed" / "s")})
        assert "cannot write" in tiny.mistake(capsys, "sweep", "--config", sweep)


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(lab: tiny.Lab, swept: dict[str, Any], tmp_path: Path) -> None:
    """Every reading of the time is a minute before the last one, in the sweep and in its workers."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "clock")}
    file = lab.sweep(tmp_path / "back.yaml")
    command = Command("sweep", "--config", file, "--workers", "2", log=tmp_path / "log.txt", env=environment)
    assert command.wait() == 0, command.said()
    assert comparable(tmp_path / "back") == swept


@pytest.mark.soak
def test_a_sweep_and_its_training_survive_thirty_kills(
    lab: tiny.Lab, swept: dict[str, Any], tmp_path: Path, counted: Counted
) -> None:
    storm, folder = sweep_storm(untrained(lab, tmp_path), tmp_path, 30, longest=60.0)
    counted("a sweep and its training", storm.counts)
    assert comparable(folder) == swept
    assert_no_leftovers(tmp_path)


@pytest.mark.soak
def test_a_fit_survives_twenty_kills(lab: tiny.Lab, fitted: dict[str, Any], tmp_path: Path, counted: Counted) -> None:
    storm, run = fit_storm(lab, tmp_path, 20, longest=25.0)
    counted("a fit", storm.counts)
    assert_same_fit(run, fitted, kills=20)
    assert_no_leftovers(run)


@pytest.mark.soak
def test_a_shared_study_survives_kills_and_cut_connections(
    lab: tiny.Lab, swept: dict[str, Any], tmp_path: Path, counted: Counted
) -> None:
    """Two hosts on one database; ten times a host, one of its workers or every connection is killed."""
    server = postgres.server()
    url, rng, log = server.database("storm"), random.Random(8), tmp_path / "log.txt"
    file = lab.sweep(tmp_path / "shared.yaml")

    def start(index: int) -> Command:
        arguments = ("--workers", "2", "--storage", url, "--heartbeat", "1")
        return Command("sweep", "--config", file, *arguments, log=log.with_suffix(f".{index}"))

    hosts, kinds, counts = [start(0), start(1)], ("all connections", "hosts", "workers"), Counter()
    while counts.total() < 10:
        time.sleep(rng.uniform(0, 12))
        index, what = rng.randrange(2), rng.choice(kinds)
        lived = hosts[index].process.poll() is None
        if what == "all connections":
            server.cut_connections("storm")
        elif what == "workers":
            lived = hosts[index].kill_descendant(rng)
        else:
            hosts[index].kill()
        if hosts[index].process.poll() is not None:
            hosts[index] = start(index)
        counts[what] += lived
    for index in range(2):
        hosts[index].wait()
        finish(lambda index=index: start(index))
    server.stop()
    counted("a study on PostgreSQL that two hosts share", counts)
    assert comparable(tmp_path / "shared") == swept
