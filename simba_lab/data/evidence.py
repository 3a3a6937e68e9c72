"""Evidence distance: how far back the token that is to be predicted was last seen.

The target at position p of a window has its evidence at the latest position before p that holds the same token id,
in the context or the suffix; its evidence distance is p minus that position, at least 1. A target without an
earlier occurrence has no evidence in the window. A target is *far* from a model that reads only the newest `reach`
context tokens when its last occurrence lies at a position < n_context - reach: such a model cannot have seen it,
while one that reads (and prunes) the whole context can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simba_lab.errors import InputError

NO_EVIDENCE = -1
ROWS_AT_ONCE = 128


def find_last_occurrence(tokens: np.ndarray, n_context: int) -> np.ndarray:
    """Where each suffix token last stood before itself.

    Args:
        tokens: (W, L) integer token ids.
        n_context: Context tokens; the suffix is the rest.

    Returns:
        (W, L - n_context) int64: the latest earlier position with the same token, -1 if there is none.
    """
    last = np.full((len(tokens), tokens.shape[1] - n_context), NO_EVIDENCE, dtype=np.int64)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        last[rows] = _previous_of_same(tokens[rows])[:, n_context:]
    return last


def evidence_distance(last_occurrence: np.ndarray, n_context: int) -> np.ndarray:
    """(W, n_suffix) int64: positions from each target back to its last occurrence, -1 where there is none."""
    targets = n_context + np.arange(last_occurrence.shape[1])
    return np.where(last_occurrence >= 0, targets - last_occurrence, NO_EVIDENCE)


def evidence_groups(last_occurrence: np.ndarray, n_context: int, edges: Sequence[int]) -> np.ndarray:
    """The distance group of every suffix token.

    Args:
        last_occurrence: (W, n_suffix) from `find_last_occurrence` or `EvalWindows`.
        n_context: Context tokens of the windows.
        edges: Ascending distances >= 2 at which a new group begins.

    Returns:
        (W, n_suffix) int64: -1 for no evidence, else g in 0..len(edges): group g holds the distances of
        `group_bounds(edges)[g]`.

    Raises:
        InputError: The edges do not ascend from at least 2.
    """
    group_bounds(edges)
    distance = evidence_distance(last_occurrence, n_context)
    groups = np.searchsorted(np.asarray(edges, dtype=np.int64), distance, side="right")
    return np.where(distance >= 0, groups, NO_EVIDENCE)


def group_bounds(edges: Sequence[int]) -> list[tuple[int, int | None]]:
    """(low, high) of each distance group, low included, high excluded, None for the open last one."""
    lows = [1, *edges]
    if any(high <= low for low, high in zip(lows, edges, strict=False)):
        raise InputError(f"edges: {list(edges)} must ascend, from at least 2")
    return list(zip(lows, [*edges, None], strict=True))


def is_far(last_occurrence: np.ndarray, n_context: int, reach: int) -> np.ndarray:
    """(W, n_suffix) bool: seen before, but only beyond the newest `reach` context tokens."""
    return (last_occurrence >= 0) & (last_occurrence < n_context - reach)


def _previous_of_same(tokens: np.ndarray) -> np.ndarray:
    """(W, L) int64: for every position the latest earlier one of the same token, -1 if none.

    A stable sort by token lines up the positions of each token in ascending order: the left neighbour is the answer.
    """
    # Sorting 16-bit integers is a radix sort: linear in the length.
    small = tokens.astype(np.uint16) if tokens.size and tokens.max() < 1 << 16 else tokens
    order = np.argsort(small, axis=1, kind="stable")
    ordered = np.take_along_axis(small, order, axis=1)
    before = np.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], NO_EVIDENCE)
    previous = np.full(tokens.shape, NO_EVIDENCE, dtype=np.int64)
    np.put_along_axis(previous, order[:, 1:], before, axis=1)
    return previous
