"""What a sweep and a training show while they run: a live table, plain lines, and files that TensorBoard reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from simba_lab.budget import Budget
from simba_lab.sweep.progress import SweepProgress
from simba_lab.training.events import Events

BUDGET = Budget(1_000_000)
PLANNED = [
    ("small", 1_000_000),
    ("dense", 1_500_000),
    ("linear:norm", 1_001_000),
    ("uniform:[red]\x1b[31m\u202e", 999_000),
]


def records(file: Path) -> list[Event]:
    """Events of a file, their checksums verified."""
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(data[12 : 12 + length])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Points of every tag as TensorBoard shows them: a session's start drops the later steps of earlier files."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns):
        for event in records(file):
            if event.session_log.status == event.session_log.START:
                shown = {tag: [point for point in points if point[0] < event.step] for tag, points in shown.items()}
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def measured(progress: SweepProgress) -> None:
    progress.skip("dense", 10)
    for name, quality in (("small", 3.5), ("linear:norm", 3.25)):
        progress.start(name)
        progress.windows_done(4)
        progress.windows_done(10)
        progress.finish(name, quality, quality + 1, 2.0)
    progress.start(PLANNED[3][0])
    progress.windows_done(5)


def test_without_a_terminal_every_arm_is_a_line_with_the_best_the_rest_and_the_compute() -> None:
    lines: list[str] = []
    with SweepProgress(40, lines.append, PLANNED, BUDGET) as progress:
        measured(progress)
        progress.finish(PLANNED[3][0], 3.75, None, 2.0)
    assert lines[0] == "dense: measured before"
    assert lines[1].startswith("small: 3.5000 nats/token, far 4.5000, 2.0 s  (50%, 0:00 left, best so far small 3.5000")
    assert "(75%," in lines[2] and "best so far linear:norm 3.2500, 78% of 4.5e-05 TFLOPs" in lines[2]
    assert "best so far linear:norm" in lines[3] and "far none" in lines[3]
    assert not any(char in "".join(lines) for char in "\x1b\u202e")


def table(progress: SweepProgress, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, legacy_windows=False).print(progress.picture())
    return [line for line in out.getvalue().splitlines() if line.strip()]


def test_the_table_ranks_arms_and_says_what_they_cost() -> None:
    progress = SweepProgress(40, print, PLANNED, BUDGET)
    progress.say = lambda line: None
    measured(progress)
    lines = table(progress, width=100)
    assert [line.split()[1] for line in lines[2:6]] == [
        "uniform:[red]\ufffd[31m\ufffd",
        "linear:norm",
        "small",
        "dense",
    ]
    assert lines[2].startswith("\u25b6") and lines[3].startswith("*") and lines[4].startswith("\u2713")
    assert lines[3].split()[2:] == ["3.2500", "4.2500", "+0.0000", "0.001001", "100.10", "%", "10", "2.0"]
    assert lines[4].split()[4] == "+0.2500" and lines[5].split()[-1] == "before" and "150.00 %" in lines[5]
    assert "best so far linear:norm 3.2500" in lines[-1]


def test_an_arm_beyond_the_budget_is_never_the_best() -> None:
    progress = SweepProgress(40, lambda line: None, PLANNED, BUDGET)
    progress.start("dense")
    progress.finish("dense", 1.0, None, 2.0)
    assert progress.best() is None and "best" not in progress.summary()
    measured(progress)
    assert progress.best().name == "linear:norm" and "best so far linear:norm" in progress.summary()


def test_an_arm_measured_before_may_be_the_best() -> None:
    progress = SweepProgress(40, lambda line: None, PLANNED, BUDGET)
    progress.skip("small", 10, 3.0, 4.0)
    progress.start("linear:norm")
    progress.finish("linear:norm", 3.25, None, 2.0)
    assert "best so far small 3.0000" in progress.summary()
    assert table(progress)[2].split()[:4] == ["*", "small", "3.0000", "4.0000"]
    assert table(progress)[3].split()[1:4] == ["linear:norm", "3.2500", "+0.2500"]


def test_more_arms_than_rows_are_counted_instead() -> None:
    progress = SweepProgress(5000, lambda line: None, [(f"arm {n}", 10) for n in range(500)], Budget(10))
    assert any("... and 400" in line or "... and 408" in line for line in table(progress))


def test_a_sweep_s_arms_are_points_that_tensorboard_reads(tmp_path: Path) -> None:
    for _ in range(2):
        with SweepProgress(40, lambda line: None, PLANNED, BUDGET, tmp_path) as progress:
            measured(progress)
    assert len(list(tmp_path.iterdir())) == 2, "two writers of one second have a file each"
    shown = scalars(tmp_path)
    assert shown["quality/linear_norm"] == [(30, 3.25)] * 2 and shown["quality_far/small"] == [(20, 4.5)] * 2
    assert shown["best/quality"][:2] == [(20, 3.5), (30, 3.25)]


def test_trials_that_nobody_planned_are_expected_to_cost_the_budget() -> None:
    lines: list[str] = []
    with SweepProgress(40, lines.append, budget=BUDGET) as progress:
        progress.skip("earlier trials", 20)
        progress.start("trial 2", 1_000_000)
        progress.windows_done(10)
        progress.finish("trial 2", 3.5, None, 2.0)
    assert "(75%," in lines[1] and "best so far trial 2 3.5000, 75% of 4e-05 TFLOPs" in lines[1]


def test_every_trial_of_a_search_is_a_point_that_tensorboard_reads(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from test_sweep import SEARCH_ONLY

    changes = SEARCH_ONLY | {"search.trials": 4, "search.n_values": 2}
    sweep = tiny.lab(tmp_path_factory.getbasetemp()).sweep(tmp_path / "found.yaml", changes)
    assert tiny.simba_lab("sweep", "--config", sweep, "--set", "search.trials=3") == 0
    assert tiny.simba_lab("sweep", "--config", sweep) == 0, "a longer search goes on in the same curves"
    folder = tmp_path / "found"
    shown, trials = scalars(folder / "search"), json.loads((folder / "results.json").read_text())["search"]["trials"]
    assert set(shown) == {f"trial/{key}" for key in ("quality", "far", "seconds", "flops")} | {
        "point/drop_0",
        "point/drop_1",
    }
    assert shown["trial/quality"] == [(row["number"], pytest.approx(row["value"])) for row in trials]
    assert shown["trial/flops"] == [(row["number"], pytest.approx(row["flops"])) for row in trials]
    assert len(trials) == 4 and scalars(folder).keys() >= {"best/quality", "quality/searched"}


def test_a_resumed_run_s_numbers_replace_those_it_repeats(tmp_path: Path) -> None:
    first = Events(tmp_path)
    for step in range(6):
        first.write({"loss": 10.0 - step}, step)
    first.close()
    second = Events(tmp_path)
    second.forget_from(4)
    second.write({"loss": 1.0}, 4)
    second.close()
    assert scalars(tmp_path)["loss"] == [(0, 10.0), (1, 9.0), (2, 8.0), (3, 7.0), (4, 1.0)]


def test_a_training_leaves_the_same_numbers_in_both_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    run = tiny.lab(tmp_path_factory.getbasetemp()).run
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = scalars(run)
    for tag in ("train/loss", "val/loss", "test/loss"):
        wanted = [(row["step"], row[tag]) for row in rows if tag in row]
        assert wanted and shown[tag] == [(step, pytest.approx(value)) for step, value in wanted]
