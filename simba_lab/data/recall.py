"""Recall tasks as a data module."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from simba_lab.data.associations import MultiQueryRecall, Needle
from simba_lab.data.checks import require_at_least, require_set
from simba_lab.data.module import ResumableData
from simba_lab.errors import InputError

STREAMS = {"train": 0, "validation": 1, "test": 2}


class RecallExamples(Dataset):
    """`count` examples of one task and split; item i is a function of (task, seed, split, i) alone.

    Items are {"tokens": (length,) int64, "labels": (length,) int64 with -100 where nothing is asked}.
    """

    def __init__(self, task: MultiQueryRecall | Needle, seed: int, split: str, count: int) -> None:
        self._task, self._seed, self._stream, self._count = task, seed, STREAMS[split], count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens, labels = self._task.example(self._seed, self._stream, range(self._count)[index])
        return {"tokens": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}


class RecallData(ResumableData):
    """MQAR or needle examples as batches {"tokens": (B, length) int64, "labels": (B, length) int64}.

    Args:
        task: `mqar` (many pairs, many queries) or `needle` (one question at a chosen distance).
        vocab_size: Token ids: a blank, keys, values and, for `needle`, filler.
        length: Tokens per example.
        n_pairs: Key-value pairs in the context.
        n_queries: Questions per example of `mqar`; null asks for every pair.
        n_suffix: Puts all questions into the last n_suffix tokens and all pairs before them, as context pruning needs.
        distance: For `needle`, positions from the question back to its key: one number, [low, high], or null for any.
        train_examples: Examples per epoch.
        validation_examples: Examples of each validation and of the test, all different from the training ones.
        batch_size: Examples per batch and process.
        seed: Decides the examples and their order; null is 0, on the command line seed_everything.
        num_workers: Loader processes; 0 draws in the training process.

    Raises:
        InputError: Values that are out of range or do not fit into each other, named `data.KEY`.
    """

    def __init__(
        self,
        task: Literal["mqar", "needle"] = "mqar",
        vocab_size: int = 256,
        length: int = 128,
        n_pairs: int = 8,
        n_queries: int | None = None,
        n_suffix: int | None = None,
        distance: int | list[int] | None = None,
        train_examples: int = 20_000,
        validation_examples: int = 512,
        batch_size: int = 32,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        require_set(vocab_size=vocab_size, length=length, n_pairs=n_pairs, train_examples=train_examples)
        require_set(validation_examples=validation_examples)
        require_at_least(1, length=length, batch_size=batch_size, n_pairs=n_pairs, n_queries=n_queries)
        require_at_least(1, train_examples=train_examples, validation_examples=validation_examples)
        require_at_least(0, seed=seed, num_workers=num_workers)
        self.task = _make_task(task, vocab_size, length, n_pairs, n_queries, n_suffix, distance)
        self.vocab_size, self.length = vocab_size, length
        self._counts = {"train": train_examples, "validation": validation_examples, "test": validation_examples}

    def examples(self, split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(count, length) tokens and labels, int64, of the first examples of a split (all unless told)."""
        if split not in STREAMS:
            raise InputError(f"split: no '{split}'; it is one of {', '.join(STREAMS)}")
        count = self._counts[split] if count is None else count
        drawn = [self.task.example(self.seed, STREAMS[split], index) for index in range(count)]
        return np.stack([tokens for tokens, _ in drawn]), np.stack([labels for _, labels in drawn])

    def dataset(self, split: str) -> RecallExamples:
        """The examples of a split."""
        return RecallExamples(self.task, self.seed, split, self._counts[split])


def _make_task(
    task: str,
    vocab_size: int,
    length: int,
    n_pairs: int,
    n_queries: int | None,
    n_suffix: int | None,
    distance: int | list[int] | None,
) -> MultiQueryRecall | Needle:
    if task == "mqar":
        if distance is not None:
            raise InputError("data.distance: only the task 'needle' has one; remove it or set data.task to needle")
        return MultiQueryRecall(vocab_size, length, n_pairs, n_pairs if n_queries is None else n_queries, n_suffix)
    if task != "needle":
        raise InputError(f"data.task: no '{task}'; it is one of mqar, needle")
    if n_queries not in (None, 1):
        raise InputError("data.n_queries: the task 'needle' asks one question; remove it or set data.task to mqar")
    if isinstance(distance, list) and len(distance) != 2:
        raise InputError(f"data.distance: {distance} must be one number or [low, high]")
    bounds = (distance[0], distance[1]) if isinstance(distance, list) else distance
    return Needle(vocab_size, length, n_pairs, bounds, n_suffix)
