"""SIGTERM, as schedulers send it: a fit saves at the end of its step and leaves with exit code 0."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from simba_lab.files import writing


class Stopping(Callback):
    """Turns SIGTERM into SIGTERMException: at once outside of training, inside at the end of the step, by Lightning.

    Lightning's own handler, which notes the signal, runs before this one.
    """

    def __init__(self) -> None:
        self._training = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles SIGTERM inside; does nothing outside of the main thread, which alone gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            raise SIGTERMException

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._training = False


def asked_to_stop(trainer: Trainer) -> bool:
    """Whether any process of the fit has been told to end; all of them get the same answer."""
    if trainer.world_size == 1:
        return trainer.received_sigterm
    return trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints are written beside their place, flushed and renamed: a kill leaves the old one or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with writing(Path(path)) as partial, open(partial, "wb") as handle:
            torch.save(checkpoint, handle)
