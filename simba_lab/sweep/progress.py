"""Progress of a sweep: a live bar with ETA on a terminal, a line per finished arm everywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType


class SweepProgress:
    """Counts windows over all arms; ETA from the windows measured in this process."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self.total, self.say = total, say
        self._done = self._measured = self._in_arm = 0
        self._started = time.monotonic()
        self._bar = None

    def __enter__(self) -> SweepProgress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("arms", total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str) -> None:
        self._in_arm = 0
        if self._bar is not None:
            self._bar.update(self._task, description=name)

    def windows_done(self, count: int) -> None:
        """``count`` windows of the current arm are done."""
        step, self._in_arm = count - self._in_arm, count
        self._done += step
        self._measured += step
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def skip(self, name: str, windows: int) -> None:
        """An arm that was measured before."""
        if windows:
            self._done += windows
            self._print(f"{name}: measured before")

    def finish(self, name: str, quality: float, far: float | None, seconds: float) -> None:
        left = round((time.monotonic() - self._started) / max(1, self._measured) * (self.total - self._done))
        shown = "none" if far is None else f"{far:.4f}"
        self._print(
            f"{name}: {quality:.4f} nats/token, far {shown}, {seconds:.1f} s  "
            f"({self._done / self.total:.0%}, {left // 60}:{left % 60:02d} left)"
        )

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            self.say(line)
