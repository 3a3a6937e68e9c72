"""How many steps of the recurrence information must make to get from the first token to the boundary."""

from __future__ import annotations

from collections.abc import Sequence


def fewest_scan_steps(kept: Sequence[Sequence[int]]) -> list[int]:
    """Scan steps made in each layer on the shortest path from position 0 to the last context position.

    ``kept[l]`` are the ascending positions in layer l, each a subset of the one below, the last position in all. In a
    layer information moves from a token to the next one present, one scan step; it goes up a layer at a token that is
    present there too. A step in an upper layer crosses at least what it crosses in a lower one, so the shortest path
    moves in each layer just to the next token that goes on, and the rest of the way in the last. Dense: T - 1 steps.
    """
    steps, here = [], 0
    for layer, positions in enumerate(kept):
        place = positions.index(here)
        last = layer + 1 == len(kept)
        here = positions[-1] if last else min(position for position in kept[layer + 1] if position >= here)
        steps.append(positions.index(here) - place)
    return steps
