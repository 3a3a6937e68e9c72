"""What a training run leaves in its folder, so that the folder describes itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from simba_lab.checkpoint import TOKENIZER_FILE, save_model
from simba_lab.environment import command_line, describe
from simba_lab.files import write_json, writing
from simba_lab.kernels.cost import CONVENTION
from simba_lab.training.loggers import FolderLogger
from simba_lab.training.sharding import whole_weights
from simba_lab.training.stopping import asked_to_stop

METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"


class MetricsFile(FolderLogger):
    """Lightning logger that appends one JSON object per logging call to ``metrics.jsonl``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / METRICS_FILE

    def write(self, metrics: dict[str, float], step: int | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")

    def forget_from(self, step: int) -> None:
        if not self.path.is_file():
            return
        rows = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) < step]
        with writing(self.path) as partial:
            partial.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def _step(line: str) -> float:
    """Step of a row; a row cut off by a crash counts as never written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints in ``checkpoints/`` of the run folder: the newest, and ``last.ckpt`` to resume from.

    Args:
        every_n_steps: steps between two checkpoints; a resumed run repeats at most that many.
    """

    def __init__(self, every_n_steps: int = 200) -> None:
        super().__init__(
            filename="step-{step:06d}", auto_insert_metric_name=False, save_last=True, save_top_k=1,
            every_n_train_steps=every_n_steps, save_on_train_epoch_end=False, enable_version_counter=False,
        )  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Saves when it is time, and when a scheduler has asked the fit to end, which Lightning does behind this step.

        Not before a validation, which the signal cuts short: a fit that resumed behind it would not repeat it.
        """
        super().on_train_batch_end(trainer, pl_module, *args)
        batches = trainer.global_step * trainer.accumulate_grad_batches
        if asked_to_stop(trainer) and batches % trainer.val_check_batch:
            trainer.save_checkpoint(str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}.ckpt"))


class RunRecord(Callback):
    """Writes run.json (versions, seed, backend, FLOPs ledger, seconds), the tokenizer, and the weights at the end."""

    def __init__(self) -> None:
        self._started = 0.0
        self._seconds_before = 0.0
        self._complete = False

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._seconds_before = state["seconds"]

    def _seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._started if self._started else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        _rewind(trainer)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            self._write(trainer, pl_module, "running")
            tokenizer = getattr(trainer.datamodule, "tokenizer", None)
            if tokenizer is not None:
                with writing(folder / TOKENIZER_FILE) as partial:
                    tokenizer.save(partial)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.interrupted:
            self._finish(trainer, pl_module)

    def complete(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For a fit that resumed behind its last step and so did not train: the end that a killed one did not reach."""
        if not self._complete:
            _rewind(trainer)
            # The checkpoint was written before Lightning had counted its step, at which the loggers go on.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
            self._finish(trainer, pl_module)

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._complete = True
        weights = whole_weights(trainer)
        if trainer.is_global_zero:
            save_model(Path(trainer.default_root_dir), pl_module.lm, weights)
            self._write(trainer, pl_module, "done")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self._started:
            self._write(trainer, pl_module, "interrupted")

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        ledger = module.ledger
        record = {
            "status": status,
            "command": command_line(),
            "started_from": module.started_from,
            "step": trainer.global_step,
            "tokens": module.tokens_seen,
            "seconds": round(self._seconds(), 2),
            "training_flops": ledger.total,
            "training_flops_by_op": ledger.by_op(),
            "convention": CONVENTION,
            "parameters": module.parameter_count,
            "backend": module.lm.backend.name,
            "processes": trainer.world_size,
            "cuda_graphs": module.step.reason or "on",
            "environment": describe(),
        }
        write_json(Path(trainer.default_root_dir) / RUN_FILE, record)


def _rewind(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, FolderLogger):
            logger.rewind(trainer.global_step)
