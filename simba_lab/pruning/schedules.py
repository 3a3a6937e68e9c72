"""Keep schedules: how many context tokens enter each layer. Pure integers; they never look at data.

Every schedule has one free parameter, ``knob``, in which its cost rises; the budget solver and ``mean_keep`` turn it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, ClassVar

from simba_lab.errors import InputError
from simba_lab.pruning.depth import checked_depth, layer_at
from simba_lab.registry import Registry, Spec


def share_in_range(owner: str, key: str, value: float | None) -> float | None:
    """``value`` if it is a share in (0, 1] or None; raises InputError that names schedule and key."""
    if value is not None and not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise InputError(f"schedule {owner}: {key} must lie in (0, 1], got {value!r}")
    return value


class KeepSchedule(ABC):
    """(n_layers, n_context) -> counts k_0 = n_context >= k_1 >= ... >= 1, as integers.

    A subclass states its curve in :meth:`shares`. ``knob`` names the ``__init__`` argument that is free, which may be
    left None until it is solved for; it lies in ``knob_range`` and more of it never means fewer tokens. Arguments are
    plain data and kept under their names. ``multiple_of`` rounds counts up to multiples (never above n_context).
    ``every`` lets counts change only at every so many layers, to the mean share of the layers up to the next change: a
    layer that is followed by as many tokens needs no scores, no selection and no gather.
    """

    knob: ClassVar[str] = "final_keep"
    knob_range: ClassVar[tuple[float, float]] = (1e-6, 1.0)
    multiple_of: int = 1
    every: int = 1

    def set_rounding(self, name: str, multiple_of: int, every: int) -> None:
        """Keeps both arguments, which every schedule of ours takes; raises InputError unless they are integers >= 1."""
        for key, value in (("multiple_of", multiple_of), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"schedule {name}: {key} must be an integer of at least 1, got {value!r}")
        self.multiple_of, self.every = multiple_of, every

    @abstractmethod
    def shares(self, n_layers: int) -> Sequence[float]:
        """Share of the context entering each layer, one number in (0, 1] per layer."""

    def counts(self, n_layers: int, n_context: int) -> list[int]:
        """Tokens entering each layer.

        Raises InputError if the free parameter is unset or the curve rises with depth or leaves (0, 1].
        """
        if n_context < 1 or n_layers < 1:
            raise InputError(f"n_context and n_layers must be at least 1, got {n_context} and {n_layers}")
        name = SCHEDULES.name_of(self)
        if getattr(self, self.knob) is None:
            raise InputError(f"schedule {name}: {self.knob} is not set; give it, or mean_keep, or a budget")
        shares = [1.0, *list(self.shares(n_layers))[1:]]
        if len(shares) != n_layers or any(not 0 < share <= 1 for share in shares):
            raise InputError(f"schedule {name}: needs {n_layers} shares in (0, 1], got {_curve(shares)}")
        if any(upper > lower + 1e-12 for lower, upper in zip(shares, shares[1:], strict=False)):
            raise InputError(f"schedule {name}: rises with depth: {_curve(shares)}; a dropped token never returns")
        # The running minimum keeps a rise within float error, which passes above, from becoming one in tokens.
        return [self._rounded(share * n_context, n_context) for share in accumulate(self._in_steps(shares), min)]

    def _in_steps(self, shares: list[float]) -> list[float]:
        """``shares`` in which each run of ``every`` layers above the first has its mean."""
        if self.every == 1:
            return shares
        steps = shares[:1]
        for first in range(1, len(shares), self.every):
            run = shares[first : first + self.every]
            steps += [sum(run) / len(run)] * len(run)
        return steps

    def _rounded(self, tokens: float, n_context: int) -> int:
        multiple = self.multiple_of
        return min(n_context, multiple * max(1, math.ceil((tokens - 0.5) / multiple)))

    def with_knob(self, value: float) -> KeepSchedule:
        """The same schedule with another value of its free parameter."""
        spec = SCHEDULES.spec(self)
        return SCHEDULES.construct(type(self), {**spec["init_args"], self.knob: value})

    def with_mean_keep(self, mean_keep: float, n_layers: int) -> KeepSchedule:
        """The schedule whose mean share over all layers is ``mean_keep``, by bisection on the free parameter."""
        name = SCHEDULES.name_of(self)
        share_in_range(name, "mean_keep", mean_keep)

        def mean(value: float) -> float:
            return sum([1.0, *list(self.with_knob(value).shares(n_layers))[1:]]) / n_layers

        low, high = self.knob_range
        if not mean(low) - 1e-9 <= mean_keep <= mean(high) + 1e-9:
            raise InputError(
                f"schedule {name}: mean_keep {mean_keep} is out of its reach on {n_layers} layers, "
                f"which is {math.ceil(1000 * mean(low)) / 1000:.3f} to {math.floor(1000 * mean(high)) / 1000:.3f}"
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < mean_keep else (low, middle)
        return self.with_knob(high)


def _curve(shares: Sequence[float]) -> str:
    return "[" + ", ".join(f"{share:.3g}" for share in shares) + "]"


SCHEDULES: Registry[KeepSchedule] = Registry("schedule", KeepSchedule)


@SCHEDULES.register("uniform")
class Uniform(KeepSchedule):
    """All tokens in the first layer, one constant share above it."""

    knob = "keep"

    def __init__(self, keep: float | None = None, multiple_of: int = 1, every: int = 1) -> None:
        self.keep = share_in_range("uniform", "keep", keep)
        self.set_rounding("uniform", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        return [1.0] + [float(self.keep)] * (n_layers - 1)


@SCHEDULES.register("linear")
class Linear(KeepSchedule):
    """Hierarchical: a straight line from 1 at the first layer to ``final_keep`` at the last (the paper: 0.10)."""

    def __init__(self, final_keep: float | None = None, multiple_of: int = 1, every: int = 1) -> None:
        self.final_keep = share_in_range("linear", "final_keep", final_keep)
        self.set_rounding("linear", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        return [1 - (1 - self.final_keep) * layer / max(1, n_layers - 1) for layer in range(n_layers)]


@SCHEDULES.register("geometric")
class Geometric(KeepSchedule):
    """The same factor between any two layers: 1 at the first, ``final_keep`` at the last."""

    knob_range = (1e-9, 1.0)

    def __init__(self, final_keep: float | None = None, multiple_of: int = 1, every: int = 1) -> None:
        self.final_keep = share_in_range("geometric", "final_keep", final_keep)
        self.set_rounding("geometric", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        return [self.final_keep ** (layer / max(1, n_layers - 1)) for layer in range(n_layers)]


@SCHEDULES.register("highway_top")
class HighwayTop(KeepSchedule):
    """Dense below ``from_layer`` (a share of the depth in (0, 1), or a layer index of 1 or more), then ``keep``."""

    knob = "keep"

    def __init__(
        self, keep: float | None = None, from_layer: float = 0.5, multiple_of: int = 1, every: int = 1
    ) -> None:
        self.keep = share_in_range("highway_top", "keep", keep)
        self.from_layer = checked_depth("schedule highway_top", "from_layer", from_layer)
        self.set_rounding("highway_top", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        first = layer_at(self.from_layer, n_layers)
        if not 1 <= first < n_layers:
            where = f"from_layer {self.from_layer} leaves no layer of {n_layers} to prune"
            raise InputError(f"schedule highway_top: {where}")
        return [1.0 if layer < first else float(self.keep) for layer in range(n_layers)]


@SCHEDULES.register("knots")
class Knots(KeepSchedule):
    """A falling piecewise-linear curve through ``values``, evenly spaced over depth from just above the first layer.

    The curve starts at 1; ``values`` are its heights at the ends of equal stretches of depth. The free parameter
    ``stretch`` bends it as a whole, share ** (1 / stretch - 1): 1/2 leaves it, towards 1 it goes dense, towards 0 it
    empties. That projects any curve onto any budget without changing the order of its layers.
    """

    knob = "stretch"
    knob_range = (1e-3, 1.0)

    def __init__(self, values: list[float], stretch: float | None = 0.5, multiple_of: int = 1, every: int = 1) -> None:
        if not values:
            raise InputError("schedule knots: values must hold at least one share")
        for position, value in enumerate(values):
            share_in_range("knots", f"values[{position}]", value)
        self.values = [float(value) for value in values]
        self.stretch = share_in_range("knots", "stretch", stretch)
        self.set_rounding("knots", multiple_of, every)

    def shares(self, n_layers: int) -> list[float]:
        heights = [1.0, *self.values]
        power = 1 / self.stretch - 1
        curve = []
        for layer in range(n_layers):
            place = layer / max(1, n_layers - 1) * len(self.values)
            left = min(int(place), len(self.values) - 1)
            share = heights[left] + (place - left) * (heights[left + 1] - heights[left])
            curve.append(max(share**power, 1e-9))
        return curve


def build_schedule(spec: Spec | KeepSchedule, **arguments: Any) -> KeepSchedule:
    """Schedule from a registry name, class path or spec; ``arguments`` that are not None overrule its init_args."""
    given = {key: value for key, value in arguments.items() if value is not None}
    if isinstance(spec, KeepSchedule):
        spec = SCHEDULES.spec(spec)
    class_path, init_args = SCHEDULES.parse(spec)
    return SCHEDULES.construct(SCHEDULES.resolve(class_path), {**init_args, **given})
