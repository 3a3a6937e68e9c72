"""One budget for all arms of a comparison: turns each arm's knob until it costs that, and refuses what cannot."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from simba_lab.budget.arms import Arm, PrunedArm
from simba_lab.errors import BudgetMismatch, InputError

BISECTIONS = 64


@dataclass(frozen=True)
class Budget:
    """FLOPs that every arm must cost: per window of context and suffix, unless the arms are about training.

    Args:
        flops: FLOPs = 2 x multiply-adds.
        tolerance: largest relative distance; 0.005 is half a percent.
        reference: where the number comes from, in words.
    """

    flops: int
    tolerance: float = 0.005
    reference: str = "given as a number"

    def __post_init__(self) -> None:
        if self.flops < 1:
            raise InputError(f"budget.flops must be at least 1, got {self.flops}")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"budget.tolerance must lie in [0, 1), got {self.tolerance}")

    @classmethod
    def of(cls, arm: Arm, tolerance: float = 0.005) -> Budget:
        """What ``arm`` costs."""
        return cls(arm.flops, tolerance, f"the arm {arm.name}")

    def part(self, share: float) -> Budget:
        """``share`` of this budget."""
        return Budget(round(share * self.flops), self.tolerance, f"{100 * share:.4g} % of {self.reference}")

    def distance(self, flops: int) -> float:
        """Relative distance, negative below the budget."""
        return (flops - self.flops) / self.flops

    def admits(self, flops: int) -> bool:
        return abs(flops - self.flops) <= self.tolerance * self.flops

    def __str__(self) -> str:
        return f"budget {self.flops:,} FLOPs ({self.reference}), tolerance {100 * self.tolerance:.4g} %"


@dataclass(frozen=True)
class Solution:
    """An arm with its knob turned to the budget; lowest and highest: the FLOPs in its reach.

    ``keep_counts`` are those of the arm when it was planned, as ``flops`` are, and stay if the arm is changed.
    """

    arm: Arm
    flops: int
    lowest: int
    highest: int
    keep_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_counts", self.keep_counts or tuple(self.arm.keep_counts))

    def line(self, budget: Budget) -> str:
        """``name: knob = value costs .. FLOPs, .. % above the budget``, and the reach of an arm that is not matched."""
        setting = f"{self.arm.knob} = {_readable(self.arm.value)} costs" if self.arm.knob else "costs"
        state = f"{self.arm.name}: {setting} {_against(self.flops, budget)}"
        if budget.admits(self.flops):
            return f"{state}; matched"
        if self.arm.knob is None:
            return f"{state}; NOT MATCHED, it has nothing to turn"
        return f"{state}; NOT MATCHED, {self.arm.knob} reaches {self.lowest:,} to {self.highest:,} FLOPs"


def _readable(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _brief(counts: Sequence[int]) -> str:
    text = ", ".join(map(str, counts))
    return f"[{text}]" if len(counts) <= 8 else f"[{', '.join(map(str, counts[:3]))}, .., {counts[-1]}]"


def _against(flops: int, budget: Budget) -> str:
    side = "above" if flops >= budget.flops else "below"
    return f"{flops:,} FLOPs, {100 * abs(budget.distance(flops)):.4g} % {side} the budget"


def solve(arm: Arm, budget: Budget) -> Solution:
    """The arm with its knob turned to the budget. Raises BudgetMismatch if it cannot get within the tolerance."""
    return match([arm], budget)[0]


def match(arms: Sequence[Arm], budget: Budget) -> list[Solution]:
    """All arms at one budget, in order, before anything runs.

    Raises BudgetMismatch, one line for every arm with its FLOPs and distance, if any is out of tolerance, and for arms
    whose FLOPs are not counted alike; InputError for a name used twice and for an arm whose FLOPs do not rise with its
    knob.
    """
    names = [arm.name for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"arms: the name {twice[0]!r} is used twice")
    _check_alike(arms)
    solutions = [closest(arm, budget) for arm in arms]
    missed = [s for s in solutions if not budget.admits(s.flops)]
    if missed:
        ordered = missed + [s for s in solutions if s not in missed]
        head = f"{len(missed)} of {len(arms)} arms cannot meet the {budget}; nothing has run"
        raise BudgetMismatch("\n".join([head, *(f"  {s.line(budget)}" for s in ordered)]))
    return solutions


def _check_alike(arms: Sequence[Arm]) -> None:
    """FLOPs of different protocols or head accountings say nothing about each other."""
    for key in ("protocol", "head"):
        first, *others = [(arm.name, getattr(arm, key)) for arm in arms] or [("", "")]
        for name, value in others:
            if value != first[1]:
                unlike = f"{first[0]} has {key} {first[1]} and {name} has {key} {value}"
                raise BudgetMismatch(f"arms: {unlike}; one comparison takes one {key}")


def check_realised(solutions: Sequence[Solution], realised: Mapping[str, int], budget: Budget) -> None:
    """Refuses results whose FLOPs, taken from the ledger of the run, are not the planned ones or left the tolerance.

    ``realised``: arm name -> FLOPs in the unit of the budget. Raises BudgetMismatch that names every such arm, and
    every arm that is no longer what was planned.
    """
    lines = []
    for solution in solutions:
        name, planned, ran = solution.arm.name, solution.flops, realised.get(solution.arm.name)
        if tuple(solution.arm.keep_counts) != solution.keep_counts or solution.arm.flops != planned:
            counts = f"{_brief(solution.keep_counts)} to {_brief(solution.arm.keep_counts)}"
            costs = "it has no ledger" if ran is None else f"ran {ran:,} FLOPs"
            changed = f"its schedule was changed, from {counts}"
            lines.append(f"  {name}: {costs}, but {planned:,} FLOPs were planned: {changed}")
        elif ran is None:
            lines.append(f"  {name}: has no ledger, {planned:,} FLOPs were planned")
        elif ran != planned:
            lines.append(f"  {name}: ran {_against(ran, budget)}, but {planned:,} FLOPs were planned")
        elif not budget.admits(ran):
            lines.append(f"  {name}: ran {_against(ran, budget)}")
    if lines:
        raise BudgetMismatch("\n".join([f"{len(lines)} of {len(solutions)} arms did not keep to the {budget}", *lines]))


@dataclass(frozen=True)
class _Point:
    """An arm with its knob at ``place``, and its FLOPs."""

    place: float
    arm: Arm
    flops: int


def closest(arm: Arm, budget: Budget) -> Solution:
    """The arm turned to the budget: within tolerance if any place of its knob is, else as close as was seen."""
    if arm.knob is None:
        return Solution(arm, arm.flops, arm.flops, arm.flops)
    low, high = (_point(arm, place) for place in arm.reach)
    _check_rising(arm, [low, high])
    visited = [low, high, *_bisection(low, high, budget.flops)]
    best = _nearest(visited, budget.flops)
    if not budget.admits(best.flops) and isinstance(arm, PrunedArm):
        best = _exhaustive(low, high, best, budget)
    flops = [point.flops for point in visited]
    return Solution(best.arm, best.flops, min(flops), max(flops))


def _point(arm: Arm, place: float) -> _Point:
    turned = arm.turned(place)
    return _Point(place, turned, turned.flops)


def _nearest(points: Sequence[_Point], target: int) -> _Point:
    """Ties go to the cheaper one."""
    return min(points, key=lambda point: (abs(point.flops - target), point.flops))


def _middle(low: _Point, high: _Point) -> float | None:
    """A place between two, None if no setting of the arm lies between theirs."""
    if isinstance(low.arm, PrunedArm) and sum(high.arm.keep_counts) - sum(low.arm.keep_counts) <= 1:
        return None
    whole = isinstance(low.place, int) and isinstance(high.place, int)
    place = (low.place + high.place) // 2 if whole else (low.place + high.place) / 2
    return place if low.place < place < high.place else None


def _bisection(low: _Point, high: _Point, target: int) -> list[_Point]:
    """Places visited on the way to where FLOPs pass the target; the last ones are next to it on either side."""
    visited = []
    for _ in range(BISECTIONS):
        place = _middle(low, high)
        if place is None:
            break
        point = _point(low.arm, place)
        _check_rising(low.arm, [low, point, high])
        visited.append(point)
        low, high = (point, high) if point.flops <= target else (low, point)
    return visited


def _check_rising(arm: Arm, points: Sequence[_Point]) -> None:
    for lower, upper in zip(points, points[1:], strict=False):
        if not lower.arm.is_below(upper.arm):
            places = f"{_readable(lower.arm.value)} to {_readable(upper.arm.value)}"
            raise InputError(
                f"arm {arm.name}: its cost falls from {lower.flops:,} to {upper.flops:,} FLOPs while {arm.knob} rises "
                f"from {places}; turning a knob up must cost more"
            )


def _exhaustive(low: _Point, high: _Point, best: _Point, budget: Budget) -> _Point:
    """A point within tolerance if the knob has one anywhere, by branch and bound; else the closest seen.

    Bisection alone may miss one: where a count rounds to that of the next layer a scoring falls away and FLOPs dip.
    """
    waiting = [(_gap(low, high, budget.flops), 0, low, high)]
    pushed = 1
    while waiting and not budget.admits(best.flops):
        gap, _, low, high = heapq.heappop(waiting)
        if gap > budget.tolerance * budget.flops:
            break
        place = _middle(low, high)
        if place is None:
            continue
        point = _point(low.arm, place)
        best = _nearest([best, point], budget.flops)
        for lower, upper in ((low, point), (point, high)):
            heapq.heappush(waiting, (_gap(lower, upper, budget.flops), pushed, lower, upper))
            pushed += 1
    return best


def _gap(low: _Point, high: _Point, target: int) -> int:
    """No place between the two can be nearer to the target than this."""
    least, most = low.arm.range_to(high.arm)
    return max(0, least - target, target - most)
