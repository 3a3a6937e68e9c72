"""Progress of a sweep: a live table of its arms on a terminal, plain lines everywhere else, and an event file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from simba_lab.budget import Budget
from simba_lab.training.events import Events

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

# Rows of the terminal that are not arms: heading, rule, summary and the line of the shell; columns that are no text.
_AROUND, _BETWEEN = 8, 10
_COLUMNS = {"NLL": 6, "far": 6, "from best": 9, "GFLOPs": 6, "of budget": 9, "windows": 7, "s": 6}
_MARKS = {"waiting": "\u00b7", "running": "\u25b6", "done": "\u2713", "before": "\u2713"}


@dataclass
class LiveArm:
    """An arm as the table shows it.

    Args:
        name: of the arm or trial.
        flops: of one window; None where nobody planned them.
        state: waiting, running, done, or before (measured by an earlier call).
        windows: measured so far.
    """

    name: str
    flops: int | None = None
    state: str = "waiting"
    windows: int = 0
    quality: float | None = None
    far: float | None = None
    seconds: float | None = None


class SweepProgress:
    """Counts windows over all arms; ETA from the windows measured in this process.

    Args:
        total: windows of all arms together.
        say: prints a line where there is no terminal.
        planned: the arms that will come, with their FLOPs; others are added as they start. Without any, all that
            come are expected to cost the budget.
        budget: what one window of an arm should cost; an arm that costs something else is never the best.
        folder: where the event file goes; None writes none.
    """

    def __init__(
        self, total: int, say: Callable[[str], None],
        planned: Sequence[tuple[str, int]] = (), budget: Budget | None = None, folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.total, self.say, self.budget = total, say, budget
        self.arms = {name: LiveArm(name, flops) for name, flops in planned}
        costs = [flops for _, flops in planned] or ([budget.flops] if budget else [0])
        self._planned = total * sum(costs) / len(costs)
        self._done = self._measured = 0
        self._current: LiveArm | None = None
        self._started = time.monotonic()
        self._events = None if folder is None else Events(folder)
        self._live: Live | None = None

    def __enter__(self) -> SweepProgress:
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(get_renderable=self.picture, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._events is not None:
            self._events.close()

    def start(self, name: str, flops: int | None = None) -> None:
        """An arm begins; ``flops`` of one window for one that was not planned."""
        self._current = self.arms.setdefault(name, LiveArm(name, flops))
        self._current.state, self._current.windows = "running", 0

    def windows_done(self, count: int) -> None:
        """``count`` windows of the current arm are done."""
        step, self._current.windows = count - self._current.windows, count
        self._done += step
        self._measured += step

    def skip(self, name: str, windows: int, quality: float | None = None, far: float | None = None) -> None:
        """An arm, or several as one, that was measured before, with what is known of it."""
        if windows:
            self._done += windows
            arm = self.arms.setdefault(name, LiveArm(name, self.budget and self.budget.flops))
            arm.state, arm.windows, arm.quality, arm.far = "before", windows, quality, far
            self._line(f"{name}: measured before")

    def finish(self, name: str, quality: float, far: float | None, seconds: float) -> None:
        arm = self.arms.setdefault(name, LiveArm(name))
        arm.state, arm.quality, arm.far, arm.seconds = "done", quality, far, seconds
        self._record(arm)
        shown = "none" if far is None else f"{far:.4f}"
        self._line(f"{name}: {quality:.4f} nats/token, far {shown}, {seconds:.1f} s  ({self.summary()})")

    def best(self) -> LiveArm | None:
        """The arm with the lowest NLL of those that cost the budget."""
        measured = [arm for arm in self.arms.values() if arm.quality is not None and self._is_matched(arm)]
        return min(measured, key=lambda arm: arm.quality, default=None)

    def _is_matched(self, arm: LiveArm) -> bool:
        if self.budget is None or arm.flops is None:
            return True
        return abs(self.budget.distance(arm.flops)) <= self.budget.tolerance

    def summary(self) -> str:
        """Share of the windows, time left, best so far, and FLOPs spent of those planned."""
        left = round((time.monotonic() - self._started) / max(1, self._measured) * max(0, self.total - self._done))
        parts = [f"{self._done / max(1, self.total):.0%}, {left // 60}:{left % 60:02d} left"]
        if not self._measured:
            parts = [f"{self._done / max(1, self.total):.0%}"]
        if best := self.best():
            parts.append(f"best so far {best.name} {best.quality:.4f}")
        if self.arms and all(arm.flops for arm in self.arms.values()):
            spent = sum(arm.flops * arm.windows for arm in self.arms.values())
            parts.append(f"{spent / self._planned:.0%} of {self._planned / 1e12:.3g} TFLOPs")
        return ", ".join(parts)

    def _record(self, arm: LiveArm) -> None:
        """One point per arm under its own name, and the course of the best over the windows measured."""
        if self._events is None:
            return
        values = {f"quality/{arm.name}": arm.quality, f"quality_far/{arm.name}": arm.far}
        best = self.best()
        values |= {f"seconds/{arm.name}": arm.seconds, "best/quality": best and best.quality}
        self._events.write({key: value for key, value in values.items() if value is not None}, self._done)

    def _line(self, line: str) -> None:
        if self._live is None:
            self.say(_inert(line))

    def picture(self) -> RenderableType:
        """The table of arms with the summary below it."""
        from rich.console import Group
        from rich.text import Text

        width, height = self._live.console.size if self._live is not None else (100, 100)
        table = self._table(max(3, height - _AROUND), max(12, width - sum(_COLUMNS.values()) - _BETWEEN))
        return Group(table, Text(_inert(self.summary())))

    def _table(self, room: int, name_width: int) -> Table:
        """Running arms first, then measured ones from the best, then waiting ones, as many as there is room for."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        table.add_column("", min_width=1)
        table.add_column("arm", overflow="ellipsis", no_wrap=True, max_width=name_width)
        for heading, width in _COLUMNS.items():
            table.add_column(heading, justify="right", no_wrap=True, min_width=width)
        ordered = sorted(self.arms.values(), key=_place)
        best = self.best()
        for arm in ordered[:room]:
            style = "bold green" if arm is best else "dim" if arm.state == "waiting" else ""
            table.add_row(*(Text(cell) for cell in self._cells(arm, best)), style=style)
        if len(ordered) > room:
            table.add_row("", f"... and {len(ordered) - room} more", style="dim")
        return table

    def _cells(self, arm: LiveArm, best: LiveArm | None) -> list[str]:
        gap = None if best is None or arm.quality is None else arm.quality - best.quality
        return [
            "*" if arm is best else _MARKS[arm.state],
            _inert(arm.name),
            _number(arm.quality, ".4f"),
            _number(arm.far, ".4f"),
            _number(gap, "+.4f"),
            _number(arm.flops and arm.flops / 1e9, ".4g"),
            _number(arm.flops and self.budget and 100 * arm.flops / self.budget.flops, ".2f", " %"),
            str(arm.windows or ""),
            _number(arm.seconds, ".1f") or ("before" if arm.state == "before" else ""),
        ]


def _place(arm: LiveArm) -> tuple[int, float]:
    order = {"running": 0, "done": 1, "before": 1, "waiting": 2}
    return order[arm.state], math.inf if arm.quality is None else arm.quality


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _inert(text: str) -> str:
    """Text that can neither move the cursor nor turn the line round."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)
