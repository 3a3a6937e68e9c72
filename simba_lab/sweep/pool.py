"""N threads, each with a worker process: together they empty a queue, and with them ends everything they started."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.sweep.children import ended, start
from simba_lab.sweep.config import SweepConfig
from simba_lab.sweep.queue import GivenBack, Queue, Task, TaskFailed
from simba_lab.sweep.study import RETRIES
from simba_lab.training.folder import NoRoom

if TYPE_CHECKING:
    from optuna.trial import Trial


class WorkerDied(Exception):
    """How it ended."""


class Slot:
    """A worker process, started when it is needed and again when it died.

    Args:
        about: the sweep, as the worker's first line.
        settings: ``KEY=VALUE`` of its environment.
        stop: set once the sweep is to end.
    """

    def __init__(self, about: dict[str, Any], settings: Sequence[str], stop: threading.Event) -> None:
        self.about, self.settings, self.stop = about, list(settings), stop
        self._process: subprocess.Popen | None = None

    def ask(self, trial: Trial, task: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer. Raises TaskFailed with its reason, also if several workers died of the task."""
        for death in range(1 + RETRIES):
            try:
                return self._answer(self._send(task))
            except WorkerDied as died:
                if self.stop.is_set():
                    raise GivenBack from None
                how = str(died)
                trial.set_user_attr("deaths", death + 1)
        raise TaskFailed(f"{1 + RETRIES} workers died of it; the last {how}")

    def _send(self, task: dict[str, Any]) -> str:
        try:
            if self._process is None:
                self._process = self._started()
            print(json.dumps(task), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if answer.endswith("\n"):
            return answer
        code = self.close()
        raise WorkerDied(ended(code))

    def _started(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        process = start(["-m", "simba_lab.sweep.worker"], self.settings, **pipes)
        print(json.dumps(self.about), file=process.stdin, flush=True)
        return process

    def _answer(self, line: str) -> dict[str, Any]:
        answer = json.loads(line)
        if "error" not in answer:
            return answer
        raise NoRoom(answer["error"]) if answer["disk"] else TaskFailed(answer["error"])

    def close(self) -> int:
        """Ends the worker; it has nothing to save."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:
                continue
        return code

    def interrupt(self) -> None:
        """From another thread: the answer that is waited for will not come."""
        if self._process is not None:
            self._process.kill()


class Pool:
    """Workers of one sweep on this host, one for each of ``shares``; leaving it ends them."""

    def __init__(self, shares: Sequence[Sequence[str]], config: SweepConfig, folder: Path) -> None:
        self.stop = threading.Event()
        about = {"config": config.to_dict(), "folder": str(folder)}
        self.slots = [Slot(about, settings, self.stop) for settings in shares]
        self._error: BaseException | None = None

    def empty(self, queue: Queue, run: Callable[[Slot, Trial, Task], float], width: int | None = None) -> None:
        """Returns when every task is done or failed. An error that is no task's own ends all and is raised here."""
        slots = self.slots[:width]
        threads = [threading.Thread(target=self._work, args=(queue, run, slot), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException:
            self._end()
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error

    def _work(self, queue: Queue, run: Callable[[Slot, Trial, Task], float], slot: Slot) -> None:
        def runs(trial: Trial, task: Task) -> float:
            try:
                return run(slot, trial, task)
            except NoRoom as error:
                self._fail(error)
                raise GivenBack from None

        try:
            queue.work(runs, self.stop)
        except BaseException as error:
            self._fail(error)
        finally:
            slot.close()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._end()

    def _end(self) -> None:
        self.stop.set()
        for slot in self.slots:
            slot.interrupt()
