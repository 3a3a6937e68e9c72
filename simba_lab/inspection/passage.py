"""What is inspected: windows of tokens from a text file or from a run's held-out data, and what the tokens say."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from simba_lab.data import TextData, Tokenizer
from simba_lab.errors import InputError

DEFAULT_CONTEXT, DEFAULT_SUFFIX, FEWEST_TOKENS = 960, 64, 8
_BYTES_PER_TOKEN, _LEAST_READ = 64, 1 << 16


@dataclass(frozen=True)
class Passage:
    """``windows`` (W, n_context + n_suffix) int64: the first is shown, measurements are means over all of them."""

    source: str
    windows: Tensor
    n_context: int
    notes: list[str] = field(default_factory=list)
    training_counts: list[int] | None = None
    """For each token of the shown window how often it occurs in the training text, where that is known."""

    @property
    def shown(self) -> list[int]:
        """Ids of the window that is shown."""
        return self.windows[0].tolist()

    @property
    def n_suffix(self) -> int:
        return self.windows.shape[1] - self.n_context


def from_text_file(
    path: Path, tokenizer: Tokenizer, n_context: int | None, n_suffix: int | None, windows: int = 1
) -> Passage:
    """Up to ``windows`` consecutive windows from the beginning of a UTF-8 file.

    Lengths that are None are 960 and 64, less where the text is shorter. Raises InputError for a file that is missing,
    empty, binary or too short.
    """
    wanted = (n_context or DEFAULT_CONTEXT) + (n_suffix or DEFAULT_SUFFIX)
    text, whole = _read(path, max(_LEAST_READ, _BYTES_PER_TOKEN * wanted * windows))
    ids = tokenizer.encode(text)
    n_context, n_suffix = _lengths(path, len(ids), n_context, n_suffix)
    length = n_context + n_suffix
    count = min(windows, len(ids) // length)
    notes = []
    if not whole or len(ids) > length:
        total = f"its {len(ids):,}" if whole else "more"
        notes.append(f"Shown are the first {length:,} tokens of {total}.")
    return Passage(path.name, torch.tensor(ids[: count * length]).view(count, length), n_context, notes)


def _read(path: Path, most: int) -> tuple[str, bool]:
    """(text, whether it is all there is), at most ``most`` bytes of it."""
    try:
        with open(path, "rb") as handle:
            raw = handle.read(most + 1)
    except OSError as error:
        raise InputError(f"--text-file: {path}: {error.strerror}; name a text file") from None
    if not raw:
        raise InputError(f"--text-file: {path} is empty; there is nothing to inspect")
    if b"\0" in raw:
        raise InputError(f"--text-file: {path} holds zero bytes, so it is no text; name a UTF-8 text file")
    whole = len(raw) <= most
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(raw[:most], final=whole), whole
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise InputError(f"--text-file: {path} is not UTF-8 text: {where}; convert it") from None


def _lengths(path: Path, tokens: int, n_context: int | None, n_suffix: int | None) -> tuple[int, int]:
    if tokens < FEWEST_TOKENS:
        raise InputError(f"--text-file: {path} has {tokens} tokens, too short a text: give {FEWEST_TOKENS} or more")
    if n_suffix is None:
        n_suffix = min(DEFAULT_SUFFIX, tokens // 4 if n_context is None else max(1, tokens - n_context))
    if n_context is None:
        n_context = min(DEFAULT_CONTEXT, max(1, tokens - n_suffix))
    if n_context + n_suffix > tokens:
        asked = f"--n-context {n_context} and --n-suffix {n_suffix}"
        raise InputError(f"--text-file: {path} has {tokens} tokens, too few for {asked}: lower them")
    return n_context, n_suffix


def from_held_out(
    data: TextData, split: str, number: int, n_context: int | None, n_suffix: int | None, count: int, windows: int = 1
) -> Passage:
    """Held-out window ``number`` of the ``count`` that ``simba-lab eval`` scores, then up to ``windows`` - 1 others.

    The others are evenly spread. Raises InputError for a number out of range.
    """
    n_context, n_suffix = n_context or DEFAULT_CONTEXT, n_suffix or DEFAULT_SUFFIX
    cut = data.eval_windows(split, n_context, n_suffix, count)
    if not 0 <= number < len(cut):
        raise InputError(f"--passage: {number} is out of range; there are windows 0 to {len(cut) - 1}")
    others = [(number + round(step * len(cut) / windows)) % len(cut) for step in range(windows)]
    chosen = list(dict.fromkeys(others))
    occurrences = torch.bincount(torch.from_numpy(data.shard("train").tokens.astype("int64")))
    shown = cut.tokens[number]
    seen = [int(occurrences[token]) if token < len(occurrences) else 0 for token in shown.tolist()]
    document = data.shard(split).names[int(cut.document[number])]
    source = f"{split} window {number} ({document})"
    return Passage(source, cut.tokens[chosen], n_context, training_counts=seen)
