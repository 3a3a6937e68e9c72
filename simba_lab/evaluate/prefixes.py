"""What requests share, as a forest of segments: tokens that several requests begin with are computed once.

A dense model may share any beginning. A pruned one shares whole contexts only, for which tokens of a context survive
depends on where it ends.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from simba_lab.evaluate.scoring import Pair

SHORTEST = 8
"""Contexts, or continuations of one context, that begin with so many tokens alike are computed together that far."""
MOST_LEVELS = 64
"""Segments on the way from a root to the end of a context, at most."""
LONGEST_SCORED = 1024
"""Continuations are fed in pieces of at most so many tokens, whose logits are held at once."""


class Target(NamedTuple):
    """Token ``token`` of pair ``pair``, predicted by the logits after token ``place`` of a segment."""

    place: int
    pair: int
    token: int


@dataclass(eq=False)
class Segment:
    """Tokens (at least one) fed after those of the parent; ``row`` is where the parent's state is to be found.

    A ``pruned`` segment is a whole context: the token that prunes it must be its last.
    """

    tokens: np.ndarray
    targets: list[Target] = field(default_factory=list)
    children: list[Segment] = field(default_factory=list)
    pruned: bool = False
    row: int = -1

    @property
    def padded(self) -> bool:
        """Whether tokens may follow it in a batch: nobody wants to know how it ends."""
        return not self.children and not self.pruned

    @property
    def n_scored(self) -> int:
        """Tokens at the end whose logits are wanted: from the first target on, at least one."""
        return len(self.tokens) - min((target.place for target in self.targets), default=len(self.tokens) - 1)


@dataclass
class _Path:
    """Tokens of a pair that are still to be put into the forest, and what follows where they end."""

    tokens: np.ndarray
    ends: list[int]


def plan_segments(pairs: Sequence[Pair], share_beginnings: bool) -> list[Segment]:
    """The forest whose roots start at the first token: every pair is a path from a root.

    The last token of a continuation is predicted, never fed. ``share_beginnings`` lets contexts share a beginning
    and continue into a continuation of theirs within one segment.
    """
    owners: dict[bytes, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        owners[pair.context.tobytes()].append(number)
    paths = [_Path(pairs[numbers[0]].context, numbers) for numbers in owners.values()]
    roots = _grow(paths) if share_beginnings else [_Growing(path.tokens, path.ends) for path in paths]
    forest = [_finish(root, pairs, share_beginnings) for root in roots]
    for root in forest:
        root.pruned = not share_beginnings
    return forest


@dataclass
class _Growing:
    """A segment before its targets are set; ``ends`` are the owners of the path that ends with it."""

    tokens: np.ndarray
    ends: list[int]
    children: list[_Growing] = field(default_factory=list)


def _grow(paths: Sequence[_Path], levels: int = MOST_LEVELS) -> list[_Growing]:
    """Segments of paths, which are all different; those that begin alike for :data:`SHORTEST` tokens share one."""
    if levels == 0:
        return [_Growing(path.tokens, path.ends) for path in paths]
    grown = []
    for _, alike in itertools.groupby(sorted(paths, key=_order), key=lambda path: path.tokens[:SHORTEST].tolist()):
        group = list(alike)
        shared = min(_common(group[0].tokens, group[-1].tokens), min(len(path.tokens) for path in group))
        ends = [number for path in group if len(path.tokens) == shared for number in path.ends]
        longer = [_Path(path.tokens[shared:], path.ends) for path in group if len(path.tokens) > shared]
        grown.append(_Growing(group[0].tokens[:shared], ends, _grow(longer, levels - 1)))
    return grown


def _order(path: _Path) -> list[int]:
    return path.tokens.tolist()


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two arrays begin with alike."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length


def _finish(grown: _Growing, pairs: Sequence[Pair], merge: bool) -> Segment:
    """The segment with its targets, and below it the longer contexts and its own continuations."""
    targets = [Target(len(grown.tokens) - 1, number, int(pairs[number].continuation[0])) for number in grown.ends]
    segment = Segment(grown.tokens, targets, [_finish(child, pairs, merge) for child in grown.children])
    segment.children += _continuations(grown.ends, pairs)
    if merge and len(segment.children) == 1:
        return _merged(segment, segment.children[0])
    return segment


def _continuations(numbers: Sequence[int], pairs: Sequence[Pair]) -> list[Segment]:
    """Segments after a context, for the pairs that have it and feed any token of their continuation."""
    fed: dict[bytes, list[int]] = defaultdict(list)
    for number in numbers:
        if len(pairs[number].continuation) > 1:
            fed[pairs[number].continuation[:-1].tobytes()].append(number)
    paths = [_Path(pairs[owners[0]].continuation[:-1], owners) for owners in fed.values()]
    return [piece for grown in _grow(paths) for piece in _pieces(grown, pairs, fed_before=0)]


def _pieces(grown: _Growing, pairs: Sequence[Pair], fed_before: int) -> Iterator[Segment]:
    """The segment of a piece of continuations, ``fed_before`` of whose tokens were fed, cut if it is too long."""
    members = _members(grown)
    head, rest = grown.tokens[:LONGEST_SCORED], grown.tokens[LONGEST_SCORED:]
    targets = [
        Target(place, number, int(pairs[number].continuation[fed_before + place + 1]))
        for number in members
        for place in range(len(head))
    ]
    below = [_Growing(rest, grown.ends, grown.children)] if len(rest) else grown.children
    after = [piece for child in below for piece in _pieces(child, pairs, fed_before + len(head))]
    yield Segment(head, targets, after)


def _members(grown: _Growing) -> list[int]:
    """All pairs whose path passes through a segment."""
    return grown.ends + [number for child in grown.children for number in _members(child)]


def _merged(segment: Segment, child: Segment) -> Segment:
    """One segment for a parent and its only child, unless that would mean logits that nobody wants, or too many."""
    if segment.targets and child.n_scored < len(child.tokens):
        return segment
    before = len(segment.tokens)
    moved = [Target(before + target.place, target.pair, target.token) for target in child.targets]
    both = Segment(np.concatenate([segment.tokens, child.tokens]), segment.targets + moved, child.children)
    return both if both.n_scored <= LONGEST_SCORED else segment
