"""The experiments of a sweep, trained by ``simba-lab fit`` unless their runs are finished."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence

from simba_lab.errors import InputError
from simba_lab.sweep.children import ended, start
from simba_lab.training import Experiment

SECONDS_TO_SAVE = 30.0


def train_if_missing(
    experiment: Experiment,
    say: Callable[[str], None],
    settings: Sequence[str] = (),
    stop: threading.Event | None = None,
) -> None:
    """Run ``simba-lab fit`` on the experiment, continuing from its last checkpoint, unless its run is finished.

    With ``stop`` set, or after any exception, the fit is told to save and waited for. Raises InputError if it failed.
    """
    if experiment.is_trained():
        say(f"{experiment.folder}: already trained")
        return
    say(f"{experiment.folder}: training {experiment.path}")
    command = ["-m", "simba_lab", "fit", "--config", str(experiment.path)]
    if (experiment.folder / "checkpoints" / "last.ckpt").is_file():
        command += ["--ckpt_path", "last"]
    child = start(command, settings)
    try:
        code = _wait(child, stop)
    except KeyboardInterrupt:
        # The terminal has interrupted the child too.
        _end(child, terminate=False)
        raise
    except BaseException:
        _end(child)
        raise
    if stop is not None and stop.is_set():
        return
    if code != 0 or not experiment.is_trained():
        raise InputError(f"training of {experiment.path} {ended(code)}; its own message is above")


def _wait(child: subprocess.Popen, stop: threading.Event | None) -> int:
    if stop is None:
        return child.wait()
    while True:
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.is_set():
                return _end(child)


def _end(child: subprocess.Popen, terminate: bool = True) -> int:
    if terminate:
        child.terminate()
    try:
        return child.wait(timeout=SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
