"""Progress of a fit: a live bar with ETA and throughput on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_READINGS = 10.0, 0.5


class Throughput(Callback):
    """Logs tokens and FLOPs per second, forward and backward, smoothed over the logging interval."""

    def __init__(self) -> None:
        self._mark: tuple[float, int, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = (time.monotonic(), pl_module.tokens_seen, pl_module.ledger.total)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return
        now = (time.monotonic(), pl_module.tokens_seen, pl_module.ledger.total)
        seconds, tokens, flops = (new - old for new, old in zip(now, self._mark, strict=True))
        self._mark = now
        if seconds > 0:
            pl_module.log("train/tokens_per_second", tokens / seconds, prog_bar=True)
            pl_module.log("train/gflops_per_second", flops / seconds / 1e9)


class Bar(RichProgressBar):
    """Lightning's bar, whose end is ``max_steps`` when that comes before the end of the epoch."""

    _read = -math.inf
    _shown: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        batches = super().total_train_batches
        trainer = self.trainer
        if trainer.max_steps is None or trainer.max_steps < 0:
            return batches
        done_before = trainer.fit_loop.epoch_progress.current.completed * batches if batches != float("inf") else 0
        left = trainer.max_steps * trainer.accumulate_grad_batches - done_before
        return min(batches, max(1, left))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """At most twice a second: every reading of a number makes the host wait for the device."""
        now = time.monotonic()
        if now - self._read >= SECONDS_BETWEEN_READINGS:
            self._shown = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)
            self._read = time.monotonic()
        return self._shown


class Lines(ProgressBar):
    """One line every ten seconds: step, loss, tokens per second, time left."""

    def __init__(self) -> None:
        super().__init__()
        self._started = self._last = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Lightning turns off the bars of all processes but the first."""
        self._last = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()
        self._first_step = trainer.global_step

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        self._last = max(self._last, self._started)

    def _due(self, last_call: bool) -> bool:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES and not (last_call and self._last != float("inf")):
            return False
        self._last = now
        return True

    def _left(self, done: int, total: int) -> str:
        left = round((time.monotonic() - self._started) / max(1, done) * max(0, total - done))
        return f"{left // 60}:{left % 60:02d} left"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        if not self._due(step >= steps):
            return
        metrics = trainer.callback_metrics
        shown = [f"step {step}/{steps}", *(f"{key} {float(metrics[key]):.4f}" for key in _shown(metrics))]
        rate = metrics.get("train/tokens_per_second")
        if rate is not None:
            shown.append(f"{float(rate):,.0f} tokens/s")
        print("  ".join([*shown, self._left(step - self._first_step, steps - self._first_step)]), flush=True)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        batches = int(sum(trainer.num_test_batches))
        if self._due(False):
            print(f"test {batch_idx + 1}/{batches}  {self._left(batch_idx + 1, batches)}", flush=True)


def _shown(metrics: dict[str, Any]) -> list[str]:
    return [key for key in ("train/loss", "val/loss", "val/bits_per_byte", "val/accuracy") if key in metrics]


def progress_callback() -> Callback:
    """A bar if standard output is a terminal, else lines."""
    return Bar(leave=True) if sys.stdout.isatty() else Lines()
