"""A training step on the CPU beside other implementations: correctness first, then one process after another."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
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
CONVENTION = "forward + mean cross-entropy + backward in fp32, no optimizer; median over repeats; one process each"


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
            raise InputError(f"--repeats: {self.repeats} repeats give no median and spread; use at least 3")
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
    rows = []
    for name in plan.names:
        progress(name)
        rows.append(_run(name, plan, threads))
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


def _run(name: str, plan: Plan, threads: int) -> dict[str, Any]:
    """The row of one implementation, measured in a fresh interpreter."""
    distribution = IMPLEMENTATIONS[name].distribution
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return {"implementation": name, "skipped": f"{distribution} is not installed"}
    command = [sys.executable, "-m", "simba_lab.bench.peers", name]
    for key, value in dataclasses.asdict(plan.shape).items():
        command += [option(key), str(value)]
    command += ["--repeats", str(plan.repeats), "--threads", str(threads), "--seed", str(plan.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with exit code {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
