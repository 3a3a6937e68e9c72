"""Synthetic recall: examples whose answers stand in the context and nowhere else.

Every example is a stream of length + 1 tokens; `tokens` are all but the last, `labels` all but the first, with -100
wherever no answer is due. Example i is drawn from a numpy generator keyed by (seed, stream, i): the same on any
machine, in any order, in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simba_lab.errors import InputError

BLANK = 0
NOT_SCORED = -100


@dataclass(frozen=True)
class Vocabulary:
    """Token 0 is the blank; the rest is shared out to keys, values and (for needles) filler, in this order."""

    n_keys: int
    n_values: int
    n_filler: int

    @classmethod
    def in_parts(cls, vocab_size: int, parts: int) -> Vocabulary:
        """Equal disjoint parts: 2 for keys and values, 3 for keys, values and filler."""
        part = (vocab_size - 1) // parts
        return cls(part, part, part if parts == 3 else 0)

    def keys(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` different keys."""
        return 1 + generator.choice(self.n_keys, count, replace=False)

    def values(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` different values, so that no answer can be right by accident."""
        return 1 + self.n_keys + generator.choice(self.n_values, count, replace=False)

    def filler(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """`count` filler tokens, with repeats."""
        return 1 + self.n_keys + self.n_values + generator.integers(self.n_filler, size=count)


@dataclass(frozen=True)
class MultiQueryRecall:
    """MQAR, multi-query associative recall (after Arora et al. 2023, arXiv 2312.04927, section 4).

    `n_pairs` pairs key, value open the sequence; then blanks, among which `n_queries` of the keys stand again, each
    followed by its value. The distance of a query from the pairs follows a power law, as repetition in text does:
    two-token slot s after the pairs is taken with a weight of s^(power - 1). The answer is due at the key, so
    its label is the value, and the model is not scored anywhere else:

        n_pairs 2, n_queries 2, length 9; keys 3 5, values 8 7
        tokens   3    8    5    7    5    7    0    3    8
        labels  -100 -100 -100 -100  7  -100 -100   8  -100

    With `n_suffix` the slots begin at position length - n_suffix, so that everything before it is context.

    Raises:
        InputError: Numbers that do not fit into each other.
    """

    vocab_size: int
    length: int
    n_pairs: int
    n_queries: int
    n_suffix: int | None = None
    power: float = 0.01

    def __post_init__(self) -> None:
        _check_pairs(self.n_pairs, Vocabulary.in_parts(self.vocab_size, 2), self.vocab_size)
        if not 1 <= self.n_queries <= self.n_pairs:
            raise InputError(f"data.n_queries: {self.n_queries} must lie in 1..n_pairs ({self.n_pairs})")
        _check_suffix(self.n_suffix, self.length)
        if self._first_slot < 2 * self.n_pairs:
            raise InputError(f"data.n_suffix: {self.n_suffix} leaves no context for {self.n_pairs} pairs")
        if self._slots < self.n_queries:
            raise InputError(
                f"data.length: {self.length} tokens hold {max(0, self._slots)} queries behind {self.n_pairs} pairs, "
                f"not {self.n_queries}; raise length (or n_suffix)"
            )

    def example(self, seed: int, stream: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(length,) tokens and (length,) labels, int64, of example `index` of a stream (0 train, 1 validation ...)."""
        generator = np.random.default_rng([seed, stream, index])
        vocabulary = Vocabulary.in_parts(self.vocab_size, 2)
        keys, values = vocabulary.keys(generator, self.n_pairs), vocabulary.values(generator, self.n_pairs)
        text = np.full(self.length + 1, BLANK, dtype=np.int64)
        text[0 : 2 * self.n_pairs : 2], text[1 : 2 * self.n_pairs : 2] = keys, values
        weights = np.arange(1, self._slots + 1, dtype=np.float64) ** (self.power - 1)
        slots = generator.choice(self._slots, self.n_queries, replace=False, p=weights / weights.sum())
        asked = generator.choice(self.n_pairs, self.n_queries, replace=False)
        queries = self._first_slot + 2 * slots
        text[queries], text[queries + 1] = keys[asked], values[asked]
        return _shifted(text, queries)

    @property
    def _first_slot(self) -> int:
        return 2 * self.n_pairs if self.n_suffix is None else self.length - self.n_suffix

    @property
    def _slots(self) -> int:
        return (self.length + 1 - self._first_slot) // 2


@dataclass(frozen=True)
class Needle:
    """One pair to be found again in filler: the last token is its key, and its value is due.

    The key stands `distance` positions before the question (so the value has this evidence distance), among
    `n_pairs - 1` other pairs, never asked for, and random filler tokens:

        n_pairs 2, distance 5, length 8; keys 1 2, values 4 5, filler 7 8 9
        tokens   8    7    1    5    2    4    9    1
        labels  -100 -100 -100 -100 -100 -100 -100  5

    `distance` is one number, or two between which it is drawn (both included), or None for every possible one.
    With `n_suffix` all pairs stand before position length - n_suffix.

    Raises:
        InputError: Numbers that do not fit into each other.
    """

    vocab_size: int
    length: int
    n_pairs: int = 8
    distance: int | tuple[int, int] | None = None
    n_suffix: int | None = None

    def __post_init__(self) -> None:
        _check_pairs(self.n_pairs, Vocabulary.in_parts(self.vocab_size, 3), self.vocab_size)
        _check_suffix(self.n_suffix, self.length)
        low, high = self._distances
        if not self._nearest <= low <= high <= self.length - 1:
            raise InputError(f"data.distance: {self.distance} must lie in {self._nearest}..{self.length - 1}")
        # Pairs stand in slots of two tokens that share the needle's parity.
        if (self._context - 1) // 2 < self.n_pairs:
            raise InputError(f"data.n_pairs: {self.n_pairs} pairs do not fit into {self._context} context tokens")

    def example(self, seed: int, stream: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(length,) tokens and (length,) labels, int64, of example `index` of a stream (0 train, 1 validation ...)."""
        generator = np.random.default_rng([seed, stream, index])
        vocabulary = Vocabulary.in_parts(self.vocab_size, 3)
        keys, values = vocabulary.keys(generator, self.n_pairs), vocabulary.values(generator, self.n_pairs)
        question = self.length - 1
        low, high = self._distances
        needle = question - int(generator.integers(low, high + 1))
        free = np.arange(needle % 2, self._context - 1, 2)
        others = generator.choice(free[free != needle], self.n_pairs - 1, replace=False)
        places = np.concatenate([[needle], others])
        text = np.concatenate([vocabulary.filler(generator, question), keys[:1], values[:1]])
        text[places], text[places + 1] = keys, values
        return _shifted(text, np.array([question]))

    @property
    def _context(self) -> int:
        """Tokens among which pairs may stand."""
        return self.length - (self.n_suffix or 1)

    @property
    def _nearest(self) -> int:
        """The smallest distance that keeps the needle's value in the context."""
        return self.length + 1 - self._context

    @property
    def _distances(self) -> tuple[int, int]:
        if self.distance is None:
            return self._nearest, self.length - 1
        return (self.distance, self.distance) if isinstance(self.distance, int) else self.distance


def _shifted(text: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels = np.full(len(text) - 1, NOT_SCORED, dtype=np.int64)
    labels[queries] = text[queries + 1]
    return text[:-1], labels


def _check_pairs(n_pairs: int, vocabulary: Vocabulary, vocab_size: int) -> None:
    if not 1 <= n_pairs <= vocabulary.n_keys:
        raise InputError(
            f"data.n_pairs: {n_pairs} must lie in 1..{vocabulary.n_keys}, the keys in a vocabulary of {vocab_size}"
        )


def _check_suffix(n_suffix: int | None, length: int) -> None:
    if n_suffix is not None and not 1 <= n_suffix < length:
        raise InputError(f"data.n_suffix: {n_suffix} must lie in 1..{length - 1}, below the length")
