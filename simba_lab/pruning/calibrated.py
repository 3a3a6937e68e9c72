"""A keep schedule made from measured harm: how much worse the model becomes when pruning begins at each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from simba_lab.errors import InputError
from simba_lab.pruning.schedules import SCHEDULES, KeepSchedule, share_in_range

_LEAST = 1e-9
"""Share that stands for none: the boundary alone."""


@dataclass(frozen=True)
class _Stretch:
    """Keeping ``width`` more of the context in layers ``first`` to ``end - 1``; ``relief`` per share and layer."""

    width: float
    first: int
    end: int
    relief: float

    @property
    def size(self) -> float:
        return self.width * (self.end - self.first)


@SCHEDULES.register("calibrated")
class Calibrated(KeepSchedule):
    """Spends kept tokens where measured losses say that they are missed most.

    ``rise[l - 1][i]`` is the rise of the loss when all tokens reach layer l and only the share ``rates[i]`` goes on
    from there: :func:`simba_lab.evaluate.sensitivity.layer_sensitivity` measures it on a few windows. The idea: a
    schedule drops the tokens ranked between two rates somewhere; dropping them at layer l is taken to cost what the
    table says for l, whatever happens to the others. That sum is least, for a given compute, if every slice of ranks
    climbs the convex hull of its losses over depth, the steepest stretch of all slices first (Everett, Operations
    Research 11, 1963). Before them all comes the share of the last rate at every depth: below it nothing was measured.

    The free parameter ``keep`` is the mean share in the layers above the first; more of it only ever adds tokens. For
    a model of another depth the table is interpolated over relative depth.
    """

    knob = "keep"

    def __init__(
        self,
        rates: list[float],
        rise: list[list[float]],
        keep: float | None = None,
        multiple_of: int = 1,
        every: int = 1,
    ) -> None:
        self.rates = _checked_rates(rates)
        self.rise = _checked_rise(rise, len(rates))
        self.keep = share_in_range("calibrated", "keep", keep)
        self.set_rounding("calibrated", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        shares = [1.0] + [0.0] * (n_layers - 1)
        left = float(self.keep) * (n_layers - 1)
        for stretch in _stretches(self.rates, _at_depth(self.rise, n_layers), n_layers):
            part = min(1.0, max(0.0, left) / stretch.size)
            for layer in range(stretch.first, stretch.end):
                shares[layer] += part * stretch.width
            left -= stretch.size
        return [min(1.0, max(_LEAST, share)) for share in shares]


def _stretches(rates: Sequence[float], rise: Sequence[Sequence[float]], n_layers: int) -> list[_Stretch]:
    """In the order in which they are worth their compute, the one below all measurements first."""
    if n_layers == 1:
        return []
    floor = _Stretch(rates[-1], 1, n_layers, math.inf)
    bounds = list(zip([1.0, *rates], rates, strict=False))
    slices = [_hull(upper - lower, harm) for (upper, lower), harm in zip(bounds, _harm(rise), strict=True)]
    rest = [stretch for hull in reversed(slices) for stretch in hull]
    return [floor, *sorted(rest, key=lambda stretch: (-stretch.relief, stretch.first))]


def _harm(rise: Sequence[Sequence[float]]) -> list[list[float]]:
    """By slice of ranks, lowest first, what dropping it at layers 1, 2, ... adds to the loss; 0 if it never is.

    Before, noise is ironed out: no cut helps, a deeper cut never costs more than one below it, nor a milder one more
    than a harder.
    """
    milder = [list(accumulate(row, max, initial=0.0)) for row in rise]
    columns = [[*accumulate(reversed(column), max)][::-1] for column in zip(*milder, strict=True)]
    slices = zip(columns, columns[1:], strict=False)
    return [[*(hard - mild for mild, hard in zip(*pair, strict=True)), 0.0] for pair in slices]


def _hull(width: float, harm: Sequence[float]) -> list[_Stretch]:
    """Stretches between the corners of the lower convex hull of ``harm`` over layers 1, 2, ..."""
    corners: list[int] = []
    for place in range(len(harm)):
        while len(corners) > 1 and _slope(harm, corners[-2], corners[-1]) >= _slope(harm, corners[-2], place):
            corners.pop()
        corners.append(place)
    relief, stretches = math.inf, []
    for first, end in zip(corners, corners[1:], strict=False):
        relief = min(relief, -_slope(harm, first, end) / width)  # so that rounding cannot put a later one first
        stretches.append(_Stretch(width, first + 1, end + 1, relief))
    return stretches


def _slope(harm: Sequence[float], first: int, end: int) -> float:
    return (harm[end] - harm[first]) / (end - first)


def _at_depth(rise: Sequence[Sequence[float]], n_layers: int) -> list[list[float]]:
    """The table for layers 1 to n_layers - 1 of a model of that depth, linear between the measured ones."""
    deepest, table = len(rise), []
    for layer in range(1, n_layers):
        place = min(max(layer / (n_layers - 1) * deepest, 1.0), float(deepest)) - 1
        below = min(int(place), deepest - 1)
        above, weight = min(below + 1, deepest - 1), place - below
        table.append([a + weight * (b - a) for a, b in zip(rise[below], rise[above], strict=True)])
    return table


def _checked_rates(rates: list[float]) -> list[float]:
    if not rates:
        raise InputError("schedule calibrated: rates must hold at least one share")
    for position, rate in enumerate(rates):
        share_in_range("calibrated", f"rates[{position}]", rate)
    if any(upper <= lower for upper, lower in zip([1.0, *rates], rates, strict=False)):
        raise InputError(f"schedule calibrated: rates must fall from below 1, got {rates}")
    return [float(rate) for rate in rates]


def _checked_rise(rise: list[list[float]], n_rates: int) -> list[list[float]]:
    if not rise:
        raise InputError("schedule calibrated: rise must hold one row for every layer above the first")
    for position, row in enumerate(rise):
        numbers = isinstance(row, (list, tuple)) and all(isinstance(value, (int, float)) for value in row)
        if not (numbers and len(row) == n_rates and all(math.isfinite(value) for value in row)):
            raise InputError(f"schedule calibrated: rise[{position}] must hold {n_rates} finite numbers, got {row!r}")
    return [[float(value) for value in row] for row in rise]
