"""A worker: measures what its sweep asks for, line by line. ``python -m simba_lab.sweep.worker``, started by the sweep.

The first line on standard input describes the sweep, every further one a task; each is answered by one line. When
standard input ends, because the sweep has ended in whatever way, the worker ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from simba_lab.errors import InputError
from simba_lab.sweep.config import SweepConfig, parse_sweep
from simba_lab.sweep.measure import Measurement
from simba_lab.sweep.plan import make_plan
from simba_lab.sweep.search import CurveSearch
from simba_lab.training import read_experiment
from simba_lab.training.folder import NoRoom, disk_errors


class Worker:
    """One sweep's plan and data in this process."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        base = read_experiment(Path(config.experiment))
        others = {arm.experiment: read_experiment(Path(arm.experiment)) for arm in config.arms if arm.experiment}
        self.config, self.plan = config, make_plan(config, base, others)
        self.measurement = Measurement(config, self.plan, folder, base)
        self.search = CurveSearch(config, self.plan, base) if config.search else None

    def answer(self, task: dict[str, Any]) -> dict[str, Any]:
        """``{arm, fingerprint}``, with the ``point`` of a searched arm, or the ``point`` alone: its curve on the
        windows of the search. Returns the quality with what else was measured."""
        if "arm" not in task:
            weights = self.measurement.weights(self.search.base)
            return self.search.measure(task["point"], weights, self.measurement.search_windows)
        if "point" in task:
            arm = self.search.planned(task["point"])
        else:
            arm = next(arm for arm in self.plan.arms if arm.name == task["arm"])
        kept = self.measurement.measure(arm, task["fingerprint"])
        quality, far = self.measurement.faces(kept)
        return {"value": quality, "far": far, "seconds": kept.record["wall_seconds"]}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    about = json.loads(lines.get())
    worker: Worker | None = None
    while True:
        task = json.loads(lines.get())
        worker = _reply(answers, worker, about, task)


def _listen(lines: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def _reply(answers: IO[str], worker: Worker | None, about: dict[str, Any], task: dict[str, Any]) -> Worker | None:
    try:
        with disk_errors():
            worker = worker or Worker(parse_sweep(about["config"], "sweep"), Path(about["folder"]))
            reply = worker.answer(task)
    except InputError as error:
        reply = {"error": str(error), "disk": isinstance(error, NoRoom)}
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}".rstrip(": "), "disk": False}
    print(json.dumps(reply), file=answers, flush=True)
    return worker


if __name__ == "__main__":
    main()
