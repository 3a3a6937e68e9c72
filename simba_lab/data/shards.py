"""Token shards: one memory-mapped array per split, built once and kept in a cache folder that names its content."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from simba_lab.data.document import Document
from simba_lab.data.split import SPLITS
from simba_lab.data.tokenizer import Tokenizer
from simba_lab.errors import InputError

ENCODE_BATCH = 64
SHOW_PROGRESS_FROM = 20_000_000


@dataclass(frozen=True)
class Shard:
    """The tokens of one split: document after document, each closed by `<|endoftext|>`.

    Attributes:
        split: `train`, `validation` or `test`.
        tokens: (N,) uint16 or uint32, memory-mapped, read-only.
        offsets: (D + 1,) int64; document i, its closing token included, is tokens[offsets[i]:offsets[i + 1]].
        names: D document names.
        token_bytes: (vocab_size,) int64, UTF-8 bytes per token id, 0 for `<|endoftext|>`.
    """

    split: str
    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]
    token_bytes: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """(D,) int64: tokens of each document, its closing `<|endoftext|>` not counted."""
        return np.diff(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """(lengths[index],) tokens of one document, without its closing `<|endoftext|>`."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] - 1]

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """The documents' texts, exactly as they were encoded."""
        return [tokenizer.decode(self.document(index).tolist()) for index in range(len(self.names))]


def write_shard(folder: Path, split: str, documents: list[Document], tokenizer: Tokenizer) -> None:
    """Encodes the documents into `SPLIT.npy`, `SPLIT.offsets.npy` and `SPLIT.names.json` of a folder."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    pieces: list[np.ndarray] = []
    for batch in _batches(documents, f"encoding {split}"):
        for ids in tokenizer.encode_batch([document.text for document in batch]):
            pieces.append(np.array([*ids, tokenizer.eot_id], dtype=dtype))
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
    np.save(folder / f"{split}.npy", np.concatenate(pieces) if pieces else np.zeros(0, dtype))
    np.save(folder / f"{split}.offsets.npy", offsets)
    (folder / f"{split}.names.json").write_text(json.dumps([document.name for document in documents]))


def read_shards(folder: Path, tokenizer: Tokenizer) -> Mapping[str, Shard]:
    """Opens the three shards of a cache folder; tokens stay on disk until they are used.

    Raises:
        InputError: A file of the folder is missing or damaged.
    """
    sizes = tokenizer.token_bytes()
    try:
        return {split: _read_shard(folder, split, sizes) for split in SPLITS}
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{folder}: damaged cache ({error}); delete the folder and it is built again") from None


def _read_shard(folder: Path, split: str, token_bytes: np.ndarray) -> Shard:
    tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
    offsets = np.load(folder / f"{split}.offsets.npy")
    names = json.loads((folder / f"{split}.names.json").read_text())
    return Shard(split, tokens, offsets, tuple(names), token_bytes)


def _batches(documents: list[Document], description: str) -> Iterator[list[Document]]:
    """Groups of documents to encode together; a progress bar on standard error when there is much to do."""
    groups = [documents[start : start + ENCODE_BATCH] for start in range(0, len(documents), ENCODE_BATCH)]
    quick = sum(len(document.text) for document in documents) < SHOW_PROGRESS_FROM
    yield from track(groups, description, console=Console(stderr=True), transient=True, disable=quick)
