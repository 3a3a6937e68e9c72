"""A training step on the CPU beside other implementations: correctness first, then a process of each, by turns."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from simba_lab.bench.machine import describe, usable_cores
from simba_lab.bench.peers import IMPLEMENTATIONS, Shape, option
from simba_lab.errors import InputError

OURS = "simba_lab"
REFERENCE = "simba_lab reference"
BASELINE = "mambapy"
# No side is a multiple of a block, a vector width or of another side.
ODD_SHAPE = Shape(d_model=20, n_layer=2, d_state=5, vocab_size=23, batch=3, length=37)
# Largest difference from the reference, relative to the largest entry of a tensor, in fp32 (unit roundoff 6e-8).
TOLERANCE = 2e-5
CONVENTION = (
    "forward + mean cross-entropy + backward in fp32, no optimizer; median over steps; one process each, by turns"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to time and how."""

    shape: Shape = Shape()
    repeats: int = 3
    threads: int | None = None
    skip: Sequence[str] = ()
    include_reference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(Shape):
            if getattr(self.shape, field.name) < 1:
                raise InputError(f"{option(field.name)}: must be at least 1")
        if self.repeats < 3:
            raise InputError(f"--repeats: {self.repeats} turns give no median and spread; use at least 3")
        if self.threads is not None and not 1 <= self.threads <= usable_cores():
            raise InputError(f"--threads: {self.threads} is not between 1 and the {usable_cores()} cores here")

    @property
    def names(self) -> list[str]:
        """Implementations in the order in which they run."""
        left_out = {*self.skip} | (set() if self.include_reference else {REFERENCE})
        return [name for name in IMPLEMENTATIONS if name not in left_out]


def compare(plan: Plan, progress: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Check our numba backend, then time every implementation of the plan.

    ``progress`` is told what runs next. Raises RuntimeError, and gives no number, if the check fails or an installed
    implementation breaks; one that is not installed gets a row with the reason under ``skipped``.
    """
    progress("correctness check")
    difference = check_correctness()
    threads = plan.threads or usable_cores()
    machine = describe()
    rows = _rows(plan, threads, progress)
    return {
        "shape": dataclasses.asdict(plan.shape),
        "threads": threads,
        "seed": plan.seed,
        "convention": CONVENTION,
        "machine": machine,
        "check": {"largest_relative_difference": difference, "tolerance": TOLERANCE},
        "rows": rows,
        "speedup_over_mambapy": speedup(rows),
    }


def speedup(rows: Sequence[dict[str, Any]]) -> float | None:
    """How many times faster our step is than mambapy's; None unless both ran."""
    seconds = {row["implementation"]: row.get("seconds_per_step") for row in rows}
    if seconds.get(BASELINE) is None or seconds.get(OURS) is None:
        return None
    return seconds[BASELINE] / seconds[OURS]


def check_correctness() -> float:
    """Largest relative difference of our numba backend from the reference: logits and every gradient, odd shape.

    Raises RuntimeError above ``TOLERANCE``.
    """
    fast, slow = (_outputs(name) for name in (OURS, REFERENCE))
    worst, where = max((_relative_difference(fast[key], slow[key]), key) for key in slow)
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"the numba backend differs from the reference by {worst:.2e} in {where} (allowed {TOLERANCE:.0e}): "
            "nothing was timed"
        )
    return worst


def _outputs(name: str) -> dict[str, Any]:
    """Logits and the gradients of all parameters, by name, on the odd shape."""
    import torch

    torch.manual_seed(0)
    model, logits = IMPLEMENTATIONS[name].build(ODD_SHAPE)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ODD_SHAPE.vocab_size, (ODD_SHAPE.batch, ODD_SHAPE.length), generator=generator)
    out = logits(tokens)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    gradients = {f"the gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}
    return {"the logits": out.detach(), **gradients}


def _relative_difference(fast: Any, slow: Any) -> float:
    """Largest absolute difference over the largest entry; infinite where a value is not a number."""
    difference = float((fast - slow).abs().max() / slow.abs().max())
    return difference if difference == difference else float("inf")


class _Process:
    """An implementation in an interpreter of its own, which waits for its turns."""

    def __init__(self, name: str, plan: Plan, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "simba_lab.bench.peers", name]
        for key, value in dataclasses.asdict(plan.shape).items():
            command += [option(key), str(value)]
        command += ["--threads", str(threads), "--seed", str(plan.seed)]
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        self._answer()

    def turn(self) -> None:
        """Returns when it has been taken. Raises RuntimeError if the process breaks."""
        try:
            print(file=self._process.stdin, flush=True)
        except BrokenPipeError:
            pass  # its last words say why
        self._answer()

    def row(self) -> dict[str, Any]:
        """Ends the process."""
        self._process.stdin.close()
        row = json.loads(self._answer())
        self._process.wait()
        return row

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"{self.name} failed with exit code {code}:\n{self._said.read()}")
        return line


def _rows(plan: Plan, threads: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each implementation of the plan, measured by turns; the reason for one that is not installed."""
    missing, processes = {}, {}
    try:
        for name in plan.names:
            distribution = IMPLEMENTATIONS[name].distribution
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                missing[name] = {"implementation": name, "skipped": f"{distribution} is not installed"}
                continue
            progress(f"{name}, warming up")
            processes[name] = _Process(name, plan, threads)
        for turn in range(plan.repeats):
            for name, process in processes.items():
                progress(f"{name}, turn {turn + 1} of {plan.repeats}")
                process.turn()
        rows = {name: process.row() for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return [missing.get(name) or rows[name] for name in plan.names]
