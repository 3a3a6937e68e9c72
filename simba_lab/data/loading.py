"""Loaders whose order follows from (seed, epoch) and whose place in it can be saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from simba_lab.errors import InputError


class EpochShuffle(DistributedSampler):
    """An endless stream of epochs, each a permutation drawn from a generator keyed by (seed, epoch) and nothing else.

    One pass gives as many items as an epoch has in full batches, from the `place` (epoch, batches) on, across the
    border of an epoch where need be. Being a `DistributedSampler` for `num_replicas` processes (1 unless told), it is
    left in place by Lightning.
    """

    def __init__(self, dataset: Sized, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.place = (0, 0)

    def __iter__(self) -> Iterator[int]:
        epoch, batches = self.place
        done = batches * self.batch_size
        return chain(self.order(epoch)[done:], self.order(epoch + 1)[:done])

    def __len__(self) -> int:
        available = len(self.dataset) // self.num_replicas
        return available - available % self.batch_size

    def order(self, epoch: int) -> list[int]:
        """This process's item indices of an epoch, in order; what does not fill a batch is left out."""
        # numpy keys a generator by a pair; torch's CPU generator uses 32 bits of one seed.
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return order[self.rank :: self.num_replicas][: len(self)].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Lightning's count is one too high after a resume from an epoch's last batch."""


class Share(DistributedSampler):
    """Every ``num_replicas``-th item from ``rank`` on, in order, none twice.

    (Lightning's own sampler for evaluation gives items twice so that all processes get equally many.)
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class EpochLoader(DataLoader):
    """A loader over an `EpochShuffle` that counts the batches it hands out, and goes on from there.

    What comes next depends only on how many batches were taken, not on passes begun, ended early or prefetched by
    workers, so a saved place is exact anywhere, at the border of an epoch and with `limit_train_batches` too. (A
    torchdata `StatefulDataLoader` saved behind the last batch of an epoch is restored as an empty pass, and the next
    order is left out.)
    """

    place = (0, 0)

    @property
    def global_batch(self) -> int:
        """Items that all processes together take at once."""
        return self.batch_size * getattr(self.sampler, "num_replicas", 1)

    def __iter__(self) -> Iterator[Any]:
        # With overfit_batches Lightning puts a sequential sampler here.
        if isinstance(self.sampler, EpochShuffle):
            self.sampler.place = self.place
        for batch in super().__iter__():
            epoch, batches = self.place
            self.place = (epoch, batches + 1) if batches + 1 < len(self) else (epoch + 1, 0)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its items all processes have been handed so far; any number may go on there."""
        epoch, batches = self.place
        return {"epoch": epoch, "items": batches * self.global_batch, "global_batch": self.global_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Lets the next pass begin at a saved place.

        Raises:
            InputError: It was reached by global batches of another size, so that the next one would be another.
        """
        if "batches" in state_dict:  # a checkpoint from before places were kept in items
            self.place = (state_dict["epoch"], state_dict["batches"])
            return
        saved, ours = state_dict["global_batch"], self.global_batch
        if saved != ours:
            raise InputError(_other_batch(saved, self.batch_size, ours // self.batch_size))
        self.place = (state_dict["epoch"], state_dict["items"] // ours)


def _other_batch(saved: int, batch_size: int, processes: int) -> str:
    fitting = f"set data.batch_size to {saved // processes}" if saved % processes == 0 else "change the devices"
    return (
        f"ckpt_path: the run trained on {saved} examples at once, data.batch_size {batch_size} in {processes} "
        f"process{'es' if processes > 1 else ''} makes {batch_size * processes}; to resume exactly, {fitting}"
    )


def training_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
    pin_memory: bool = False,
) -> EpochLoader:
    """Shuffled full batches; an incomplete last batch is dropped, other items each epoch.

    With `pin_memory` batches lie in page-locked memory, from which a copy to a GPU does not wait for the GPU.

    Raises:
        InputError: Fewer items than one batch per process.
    """
    if len(dataset) < batch_size * num_replicas:
        available = len(dataset) // num_replicas
        raise InputError(f"data.batch_size: {batch_size} is more than the {available} training examples there are")
    return EpochLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochShuffle(dataset, batch_size, seed, num_replicas, rank),
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )


def evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    count: int | None,
    num_workers: int = 0,
    num_replicas: int = 1,
    rank: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """The items in their order, the same ones every time: all, or `count` evenly spread ones; a share per process.

    Raises:
        InputError: Fewer items than processes.
    """
    if count is not None and count < len(dataset):
        dataset = Subset(dataset, [index * len(dataset) // count for index in range(count)])
    if len(dataset) < num_replicas:
        raise InputError(
            f"data: {num_replicas} processes share {len(dataset)} held-out examples; give at least one each"
        )
    # A generator of its own keeps the loader from drawing its workers' seed from the global one.
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=Share(dataset, num_replicas, rank),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
