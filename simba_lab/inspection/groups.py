"""Aggregate views: tokens of the context grouped by part, frequency and kind, and the share of each that is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from simba_lab.inspection.pieces import KINDS

PARTS = 16


@dataclass(frozen=True)
class View:
    """One way to group the T context tokens: ``member[t]`` is the index into ``labels`` of the group of token t."""

    key: str
    title: str
    labels: list[str]
    member: list[int]

    def sizes(self) -> list[int]:
        """Tokens in each group."""
        counted = Counter(self.member)
        return [counted[group] for group in range(len(self.labels))]

    def kept(self, dropped_before: Sequence[int | None], n_layer: int) -> list[list[float | None]]:
        """Share of each group that enters each layer, (groups, n_layer); None for an empty group."""
        entered = [[0] * n_layer for _ in self.labels]
        for group, dropped in zip(self.member, dropped_before, strict=True):
            for layer in range(n_layer if dropped is None else dropped):
                entered[group][layer] += 1
        sizes = self.sizes()
        return [[count / size if size else None for count in row] for row, size in zip(entered, sizes, strict=True)]

    def plain(self) -> dict[str, Any]:
        """The view without its members, for JSON."""
        return {"key": self.key, "title": self.title, "labels": self.labels, "sizes": self.sizes()}


def views(ids: Sequence[int], kinds: Sequence[str], training_counts: Sequence[int] | None) -> list[View]:
    """All views of a context: by part, by frequency in it (and in the training text, where known), by kind."""
    counts = Counter(ids)
    found = [by_part(len(ids)), _by_power("frequency", "by occurrences in the context", [counts[i] for i in ids], 2)]
    if training_counts is not None:
        title = "by occurrences in the training text"
        found.append(_by_power("training_frequency", title, training_counts[: len(ids)], 10))
    present = [kind for kind in KINDS if kind in kinds]
    found.append(View("kind", "by kind of text", present, [present.index(kind) for kind in kinds]))
    return found


def by_part(n_context: int, parts: int = PARTS) -> View:
    """Equal parts of the context, oldest first; labels are the positions they span."""
    parts = min(parts, n_context)
    member = [position * parts // n_context for position in range(n_context)]
    first = [member.index(part) for part in range(parts)] + [n_context]
    labels = [_span(low, high - 1) for low, high in zip(first, first[1:], strict=False)]
    return View("part", "by position in the context", labels, member)


def _by_power(key: str, title: str, counts: Sequence[int], base: int) -> View:
    """Groups [base^i, base^(i+1)) of ``counts``, and one for 0; empty ones at the ends left out."""
    powers = [_power(count, base) for count in counts]
    used = range(min(powers), max(powers) + 1)
    labels = ["never" if power < 0 else _span(base**power, base ** (power + 1) - 1) for power in used]
    return View(key, title, labels, [power - used.start for power in powers])


def _power(count: int, base: int) -> int:
    power = -1
    while count:
        count, power = count // base, power + 1
    return power


def _span(low: Hashable, high: Hashable) -> str:
    return f"{low:,}" if low == high else f"{low:,}\N{EN DASH}{high:,}"
