"""Commands as processes of their own, to be killed: what they leave running, and what they leave on disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

SECONDS_TO_DIE = 20.0


class Command:
    """``simba-lab`` with these arguments, in a session of its own, by which its descendants are found."""

    def __init__(self, *arguments: str | Path, log: Path, **options: Any) -> None:
        self.log = log
        command = [sys.executable, "-W", "ignore", "-m", "simba_lab", *map(str, arguments)]
        with open(log, "w", encoding="utf-8") as handle:
            self.process = subprocess.Popen(command, stdout=handle, stderr=handle, start_new_session=True, **options)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def descendants(self) -> list[int]:
        """Living processes of the session but the command itself."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(status.parent.name))
        return [pid for pid in found if pid != self.process.pid]

    def wait(self, seconds: float = 300.0) -> int:
        return self.process.wait(timeout=seconds)

    def until(self, condition: Callable[[], bool], seconds: float = 120.0) -> None:
        """Waits for the condition, or the end of the command."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9 of the command alone; its descendants must follow by themselves."""
        self.process.kill()
        self.process.wait()
        self.assert_nothing_lives()

    def kill_descendant(self, rng: random.Random) -> bool:
        """kill -9 of one of its descendants; False if there is none."""
        living = sorted(self.descendants())
        if not living:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(living), signal.SIGKILL)
        return True

    def assert_nothing_lives(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_DIE
        while left := self.descendants():
            assert time.monotonic() < deadline, f"orphans: {left}"
            time.sleep(0.05)


def assert_whole(folder: Path) -> None:
    """Every file that stands can be read to its end; what was being written has another name."""
    for path in folder.rglob("*"):
        if path.name.endswith(".json"):
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            load_file(path)


def assert_no_leftovers(folder: Path) -> None:
    assert not list(folder.rglob("*.partial"))


def comparable(folder: Path) -> dict[str, Any]:
    """results.json without what the clock, the command line and the place on disk decide."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for key in ("created", "command", "config", "environment", "name", "seal"):
        results.pop(key, None)
    return results | {"arms": [{k: v for k, v in arm.items() if k != "wall_seconds"} for arm in results["arms"]]}


def trained(folder: Path) -> dict[str, Any]:
    """Everything a finished fit left that neither a clock nor the place on disk decides."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if "per_second" not in k} for line in lines]
    same = ("status", "step", "tokens", "training_flops", "training_flops_by_op", "backend", "parameters")
    weights = (folder / "model.safetensors").read_bytes()
    return {"weights": weights, "metrics": [row for row in rows if len(row) > 1]} | {key: record[key] for key in same}


def assert_same_fit(run: Path, calm: dict[str, Any], kills: int = 0) -> None:
    """The run folder holds what the undisturbed fit left; a kill between a checkpoint and its row costs that row."""
    found = trained(run)
    rows, wanted = found.pop("metrics"), {**calm}.pop("metrics")
    assert found == {key: value for key, value in calm.items() if key != "metrics"}
    assert [row for row in rows if row not in wanted] == [] and len(wanted) - len(rows) in range(kills + 1)
    assert rows[-1] == wanted[-1]
