"""One line of a bench: ours, the peer beside it, the figure that has a target, and the floor. Plain data for JSON."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from simba_lab.bench.floors import Ceilings, Floor, ask_driver
from simba_lab.bench.machine import describe
from simba_lab.bench.timing import Timing, free_memory

# How a figure reads: a ratio of speeds, a share of a time, or a share of what FLOPs promise.
FIGURES = {"speed": "{:.2f}x", "share": "{:.1%}", "promise": "{:.2f} of FLOPs"}


@dataclass(frozen=True)
class Target:
    """What the figure of a line is held to: at least ``value``, or at most."""

    value: float
    at_most: bool = False

    def met_by(self, figure: float) -> bool:
        return figure <= self.value if self.at_most else figure >= self.value


@dataclass(frozen=True)
class Line:
    """``what`` was measured: ours and the peer's in ``unit``, the figure drawn from them, its target and floor.

    A line without a number says in ``note`` why. ``fraction`` is how much of the floor's speed ours reaches.
    """

    what: str
    unit: str = "ms"
    ours: float | None = None
    spread: tuple[float, float] | None = None
    peer: str | None = None
    theirs: float | None = None
    figure: float | None = None
    figure_kind: str = "speed"
    target: Target | None = None
    floor: Floor | None = None
    fraction: float | None = None
    note: str = ""
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        plain = dataclasses.asdict(self)
        if self.target is not None and self.figure is not None:
            plain["met"] = self.target.met_by(self.figure)
        return plain


def timed(what: str, ours: Timing, floor: Floor | None = None, **more: Any) -> Line:
    """A line about one time of ours."""
    fraction = None if floor is None else floor.ms / ours.median
    return Line(what, ours=ours.median, spread=(ours.low, ours.high), floor=floor, fraction=fraction, **more)


def beside(
    what: str, ours: Timing, peer: str, theirs: Timing | str, target: Target | None = None, floor: Floor | None = None
) -> Line:
    """Two times and how many times faster ours is; ``theirs`` may be the reason why there is none."""
    if isinstance(theirs, str):
        return timed(what, ours, floor, peer=peer, target=target, note=theirs)
    figure = theirs.median / ours.median
    return timed(what, ours, floor, peer=peer, theirs=theirs.median, figure=figure, target=target)


def throughput(
    what: str, tokens: int, ours: Timing, peer: str, theirs: Timing | str, target: Target | None = None,
    floor: Floor | None = None,
) -> Line:  # fmt: skip
    """The same in tokens per second, ``tokens`` being those of one timed call."""
    line = beside(what, ours, peer, theirs, target, floor)
    per_second = [1e3 * tokens / ms for ms in (ours.median, ours.high, ours.low)]
    return dataclasses.replace(
        line,
        unit="tokens/s",
        ours=per_second[0],
        spread=(per_second[1], per_second[2]),
        theirs=None if line.theirs is None else 1e3 * tokens / line.theirs,
    )


def attempt(what: str, measure: Callable[[], Iterable[Line]]) -> list[Line]:
    """The lines of one measurement; where it breaks, a last line that says how and has no number.

    Whatever breaks here (a red check, memory, a compiler) must not cost the measurements around it; the command ends
    with a non-zero exit code.
    """
    lines: list[Line] = []
    try:
        for line in measure():
            lines.append(line)  # one by one: those before a failure stay
    except Exception as error:
        lines.append(Line(what, note=_said(error), failed=True))
    free_memory()
    return lines


def or_reason(peer: str, measure: Callable[[], Timing]) -> Timing | str:
    """A peer's time, or what it broke with: that must not cost our own."""
    try:
        return measure()
    except Exception as error:
        return f"{peer} failed: {_said(error)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def result(bench: str, lines: Iterable[Line], checks: list[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """The JSON of a bench; ``exit_code`` is 1 if any line failed."""
    lines = list(lines)
    return {
        "bench": bench,
        "date": datetime.date.today().isoformat(),
        "machine": describe() | gpu_facts(),
        **{key: dataclasses.asdict(value) if isinstance(value, Ceilings) else value for key, value in facts.items()},
        "checks": checks,
        "lines": [line.to_dict() for line in lines],
        "exit_code": int(any(line.failed for line in lines)),
    }


def gpu_facts() -> dict[str, str]:
    """Versions beside those of :func:`simba_lab.bench.machine.describe`; the driver's where there is a GPU."""
    facts = {}
    for package in ("triton", "mamba-ssm", "causal-conv1d", "transformers"):
        version = package_version(package)
        if version:
            facts[package] = version
    if torch.cuda.is_available():
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = ask_driver("driver_version", torch.device("cuda"))
    return facts


def package_version(package: str) -> str | None:
    """Of an installed distribution, or of an importable folder that says its own."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        try:
            return getattr(importlib.import_module(package.replace("-", "_")), "__version__", None)
        except ImportError:
            return None
