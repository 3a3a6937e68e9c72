"""One arm's way of pruning: a criterion, a keep schedule, and what is done for recent tokens and for neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simba_lab.errors import InputError
from simba_lab.pruning.criteria import CRITERIA, Criterion
from simba_lab.pruning.schedules import SCHEDULES, KeepSchedule, build_schedule
from simba_lab.registry import Spec

CONVOLUTIONS = ("compacted", "adjacent")


@dataclass(frozen=True)
class PruningPlan:
    """Criterion + keep schedule.

    ``protect_recent`` is the share of the kept set that is its newest tokens. ``convolution`` says what a layer's
    convolution reads beside a token whose neighbours are gone: ``compacted``, whatever stands there now (the paper);
    ``adjacent``, nothing, as at the start of a text, unless it is a true neighbour. Both cost the same.
    """

    criterion: Criterion
    schedule: KeepSchedule
    protect_recent: float = 0.0
    convolution: str = "compacted"

    def __post_init__(self) -> None:
        if self.convolution not in CONVOLUTIONS:
            raise InputError(f"convolution must be one of {', '.join(CONVOLUTIONS)}, got {self.convolution!r}")
        if not 0 <= self.protect_recent <= 1:
            raise InputError(f"protect_recent must lie in [0, 1], got {self.protect_recent}")

    @classmethod
    def build(
        cls,
        n_layers: int,
        criterion: Spec | Criterion,
        schedule: Spec | KeepSchedule,
        mean_keep: float | None = None,
        protect_recent: float = 0.0,
        convolution: str = "compacted",
        **schedule_arguments: Any,
    ) -> PruningPlan:
        """Plan from specs; ``mean_keep`` solves the schedule's free parameter, other arguments go to the schedule."""
        built = build_schedule(schedule, **schedule_arguments)
        if mean_keep is not None:
            in_spec = {} if isinstance(schedule, KeepSchedule) else SCHEDULES.parse(schedule)[1]
            if any(given.get(built.knob) is not None for given in (in_spec, schedule_arguments)):
                raise InputError(f"give mean_keep or {built.knob}, not both")
            built = built.with_mean_keep(mean_keep, n_layers)
        return cls(CRITERIA.build(criterion), built, protect_recent, convolution)

    def spec(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_spec` rebuilds the plan."""
        return {
            "criterion": CRITERIA.spec(self.criterion),
            "schedule": SCHEDULES.spec(self.schedule),
            "protect_recent": self.protect_recent,
            "convolution": self.convolution,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PruningPlan:
        unknown = set(spec) - {"criterion", "schedule", "protect_recent", "convolution"}
        if unknown or not {"criterion", "schedule"} <= set(spec):
            raise InputError(
                "pruning: expected criterion, schedule and perhaps protect_recent and convolution, "
                f"got {', '.join(spec) or 'nothing'}"
            )
        options = {key: spec[key] for key in ("protect_recent", "convolution") if key in spec}
        return cls(CRITERIA.build(spec["criterion"]), build_schedule(spec["schedule"]), **options)

    @property
    def name(self) -> str:
        """``schedule:criterion``, class names for a user's own."""
        return ":".join(
            full.rpartition(".")[2] for full in (SCHEDULES.name_of(self.schedule), CRITERIA.name_of(self.criterion))
        )
