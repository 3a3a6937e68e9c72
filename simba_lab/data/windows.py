"""Windows over a shard: fixed ones to train on, context-and-suffix ones inside single documents to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from simba_lab.data.evidence import find_last_occurrence
from simba_lab.data.shards import Shard
from simba_lab.errors import InputError


class TrainingWindows(Dataset):
    """Consecutive, non-overlapping windows of the stream of documents.

    Item w is {"tokens": (length,) int64, "labels": (length,) int64}: the stream from w * length on, and the same one
    token later. Windows run across documents, whose end the model sees as `<|endoftext|>`; a ragged tail is dropped.

    Args:
        shard: The split to read.
        length: Tokens per window.

    Raises:
        InputError: The split is shorter than one window and its last label.
    """

    def __init__(self, shard: Shard, length: int) -> None:
        self._tokens = shard.tokens
        self._length = length
        if len(self) < 1:
            raise InputError(
                f"data.length: a window of {length} tokens and its last label need {length + 1} tokens, the "
                f"{shard.split} split has {len(shard.tokens)}; lower data.length or give more text"
            )

    def __len__(self) -> int:
        return max(0, len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = range(0, len(self) * self._length, self._length)[index]
        stream = torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
        return {"tokens": stream[:-1], "labels": stream[1:]}


@dataclass(frozen=True)
class EvalWindows:
    """W windows of n_context + n_suffix tokens; quality is measured on the suffix, position n_context on.

    Attributes:
        tokens: (W, n_context + n_suffix) int64.
        document: (W,) int64, index of the document in its shard; windows of one document are not independent.
        n_context: Context tokens.
        n_bytes: (W,) int64, UTF-8 bytes of the suffix's text.
        last_occurrence: (W, n_suffix) int64, see `simba_lab.data.evidence`; -1 where a token is new.
        scored: (W, n_suffix) bool, the suffix tokens that count; None is all of them.
    """

    tokens: torch.Tensor
    document: np.ndarray
    n_context: int
    n_bytes: np.ndarray
    last_occurrence: np.ndarray
    scored: np.ndarray | None = None

    @property
    def counted(self) -> np.ndarray:
        """(W, n_suffix) bool, the suffix tokens that quality is measured on."""
        return np.ones_like(self.last_occurrence, dtype=bool) if self.scored is None else self.scored

    @property
    def n_suffix(self) -> int:
        return self.tokens.shape[1] - self.n_context

    def __len__(self) -> int:
        return len(self.tokens)


def cut_eval_windows(
    shard: Shard, n_context: int, n_suffix: int, count: int, stride: int | None = None, seed: int = 0
) -> EvalWindows:
    """Cuts windows that each lie inside one document and whose suffixes never overlap.

    Args:
        shard: The split to read.
        n_context: Context tokens, at least 1.
        n_suffix: Suffix tokens, at least 1.
        count: Windows wanted. Of more available ones, `count` evenly spread over the split are taken; of fewer, all.
        stride: Tokens from one window's start to the next in a document; at least n_suffix, which is the default.
        seed: Shifts the evenly spread choice; without effect when all windows are taken.

    Raises:
        InputError: A number out of range, or a window longer than every document.
    """
    stride = n_suffix if stride is None else stride
    _check_cut(n_context, n_suffix, count, stride)
    length = n_context + n_suffix
    document, start = _candidates(shard, length, stride)
    if len(start) > count:
        shift = np.random.default_rng(seed).random()
        chosen = ((np.arange(count) + shift) * (len(start) / count)).astype(np.int64)
        document, start = document[chosen], start[chosen]
    tokens = shard.tokens[start[:, None] + np.arange(length)].astype(np.int64)
    return EvalWindows(
        tokens=torch.from_numpy(tokens),
        document=document,
        n_context=n_context,
        n_bytes=shard.token_bytes[tokens[:, n_context:]].sum(axis=1),
        last_occurrence=find_last_occurrence(tokens, n_context),
    )


def _candidates(shard: Shard, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Document index and start in the stream of every possible window, in stream order."""
    lengths = shard.lengths
    per_document = np.where(lengths >= length, (lengths - length) // stride + 1, 0)
    if not per_document.sum():
        longest = int(lengths.argmax()) if len(lengths) else None
        best = "it has none" if longest is None else f"longest: {shard.names[longest]}, {lengths[longest]} tokens"
        raise InputError(
            f"n_context + n_suffix: a window of {length} tokens is longer than every {shard.split} document "
            f"({best}); lower n_context or give longer documents"
        )
    document = np.repeat(np.arange(len(lengths)), per_document)
    first = np.repeat(np.cumsum(per_document) - per_document, per_document)
    return document, shard.offsets[document] + (np.arange(len(document)) - first) * stride


def _check_cut(n_context: int, n_suffix: int, count: int, stride: int) -> None:
    for key, value in (("n_context", n_context), ("n_suffix", n_suffix), ("count", count)):
        if value < 1:
            raise InputError(f"{key}: {value} must be at least 1")
    if stride < n_suffix:
        raise InputError(f"stride: {stride} must be at least n_suffix ({n_suffix}), or suffixes would overlap")
