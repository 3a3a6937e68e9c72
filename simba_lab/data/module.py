"""What every data module of the project shares: training that can be continued exactly, fixed held-out batches."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from simba_lab.data.loading import EpochLoader, evaluation_loader, training_loader


class ResumableData(LightningDataModule, ABC):
    """A data module with the splits `train`, `validation` and `test`.

    The place in the training order is saved with the module as well as with the loader: Lightning restores a loader
    only from checkpoints made within an epoch, a module from those made at its end too. It is kept in examples, so that
    another number of processes may continue with the same global batch.

    Args:
        batch_size: Examples per batch and process.
        seed: Decides the order of the training examples, together with the epoch; null is 0, on the command line
            seed_everything.
        num_workers: Loader processes; 0 reads in the training process.
    """

    def __init__(self, batch_size: int, seed: int | None, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed or 0, num_workers
        self._training: EpochLoader | None = None
        self._restored: dict[str, int] | None = None

    @abstractmethod
    def dataset(self, split: str) -> Dataset:
        """Items {"tokens": (length,) int64, "labels": (length,) int64} of a split."""

    def held_out_count(self, split: str) -> int | None:
        """Items of `validation` or `test` to read, evenly spread; None for all."""
        return None

    def train_dataloader(self) -> EpochLoader:
        """Shuffled batches; a checkpoint made during `fit` restores the place in the epoch."""
        loader = training_loader(
            self.dataset("train"), self.batch_size, self.seed, self.num_workers, *self._processes()
        )
        if self._restored is not None:
            loader.load_state_dict(self._restored)
        self._training, self._restored = loader, None
        return loader

    def val_dataloader(self) -> DataLoader:
        """The same validation batches every time."""
        return self._held_out("validation")

    def test_dataloader(self) -> DataLoader:
        """The same test batches every time."""
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader:
        """The test batches."""
        return self._held_out("test")

    def state_dict(self) -> dict[str, int]:
        """The place in the training order; empty before training."""
        return self._training.state_dict() if self._training else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Lets the next `fit` begin at a saved place; other uses of a checkpoint have none."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._restored = state_dict

    def _held_out(self, split: str) -> DataLoader:
        return evaluation_loader(
            self.dataset(split), self.batch_size, self.held_out_count(split), self.num_workers, *self._processes()
        )

    def _processes(self) -> tuple[int, int, bool]:
        """How many share the data, which of them this one is, and whether it feeds a GPU."""
        if self.trainer is None:
            return 1, 0, False
        on_gpu = self.trainer.strategy.root_device.type == "cuda"
        return self.trainer.world_size, self.trainer.global_rank, on_gpu
