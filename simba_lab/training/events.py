"""Metrics as TensorBoard reads them, beside the JSON lines: ``tensorboard --logdir runs`` shows every run and sweep."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only

from simba_lab.training.loggers import FolderLogger

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

SECONDS_BETWEEN_FLUSHES = 10
_NUMBERS = itertools.count()


class Events:
    """An event file in ``folder``, begun with the first number; later files of one folder continue earlier ones.

    Threads may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._writing = threading.Lock()

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Scalars at one step; a kill loses at most those of the last ten seconds."""
        with self._writing:
            writer = self._opened(None)
            for name, value in values.items():
                writer.add_scalar(name, value, step)

    def forget_from(self, step: int) -> None:
        """What earlier files of the folder hold from ``step`` on is written again: TensorBoard drops it."""
        self.close()
        if step > 0:
            self._opened(step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self, purge_step: int | None) -> SummaryWriter:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # The name that tensorboardX gives holds the second and the host, which several writers may share.
            suffix = f".{os.getpid()}-{next(_NUMBERS)}"
            self._writer = SummaryWriter(
                str(self.folder), purge_step=purge_step, flush_secs=SECONDS_BETWEEN_FLUSHES, filename_suffix=suffix
            )
        return self._writer


class EventsLogger(FolderLogger):
    """Lightning logger that writes every number it is given into an event file of the run folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.events = Events(folder)

    def write(self, metrics: dict[str, float], step: int | None) -> None:
        self.events.write(metrics, step or 0)

    def forget_from(self, step: int) -> None:
        self.events.forget_from(step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.events.close()
