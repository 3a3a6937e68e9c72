"""Which document belongs to which split: decided by its name, never by its place or by a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from simba_lab.data.document import Document

SPLITS = ("train", "validation", "test")
FEW_DOCUMENTS = 10


def split_documents(
    documents: Sequence[Document], validation_share: float, test_share: float
) -> dict[str, list[Document]]:
    """Divides documents into train, validation and test so that the shares hold by text size.

    Documents are laid out in the order of the SHA-256 of their names, each covering a stretch as long as its text.
    Those whose middle falls into the first `test_share` of the line are test, the next `validation_share`
    validation, the others training. So the split is the same on every machine, and a share is missed by at most
    half the document at its border. With fewer than 10 documents each one is cut instead, at line ends: its head
    trains, then comes validation, its tail is test; the parts are named `NAME#train` and so on.

    Returns:
        The documents of each split, in the order in which they were given.
    """
    if len(documents) < FEW_DOCUMENTS:
        return _cut_each(documents, validation_share, test_share)
    total = sum(len(document.text) for document in documents)
    split_of: dict[str, str] = {}
    before = 0
    for document in hash_order(documents):
        middle = (before + len(document.text) / 2) / total
        before += len(document.text)
        held_out = "test" if middle < test_share else "validation"
        split_of[document.name] = held_out if middle < test_share + validation_share else "train"
    return {split: [d for d in documents if split_of[d.name] == split] for split in SPLITS}


def hash_order(documents: Sequence[Document]) -> list[Document]:
    """The documents in an order that looks random but follows from their names alone."""
    return sorted(documents, key=lambda document: (hashlib.sha256(document.name.encode()).digest(), document.name))


def without_repeats(splits: Mapping[str, Sequence[Document]]) -> dict[str, list[Document]]:
    """Keeps each text once: in test before validation before training, then where it came first.

    Texts that differ in white space only count as the same, so that no held-out text was trained on.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    for split in reversed(SPLITS):
        kept[split] = []
        for document in splits[split]:
            text = hashlib.sha256(" ".join(document.text.split()).encode()).digest()
            if text not in seen:
                seen.add(text)
                kept[split].append(document)
    return {split: kept[split] for split in SPLITS}


def _cut_each(documents: Sequence[Document], validation_share: float, test_share: float) -> dict[str, list[Document]]:
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        first = _line_end(document.text, 1 - validation_share - test_share)
        second = max(first, _line_end(document.text, 1 - test_share))
        for split, start, stop in zip(SPLITS, (0, first, second), (first, second, None), strict=True):
            text = document.text[start:stop]
            if text.strip():
                parts[split].append(Document(f"{document.name}#{split}", text))
    return parts


def _line_end(text: str, share: float) -> int:
    """The character after the first line end at or behind a share of the text; without one, the share itself."""
    position = round(len(text) * share)
    newline = text.find("\n", position)
    return newline + 1 if 0 < position < len(text) and 0 <= newline < len(text) - 1 else position
