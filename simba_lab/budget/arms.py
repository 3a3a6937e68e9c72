"""What the solver sees of an arm: its FLOPs in closed form and the one knob that may be turned, if any."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from simba_lab.errors import InputError
from simba_lab.kernels import cost
from simba_lab.model import Breakdown, ModelConfig, forward_flops
from simba_lab.model.cost import scoring_flops
from simba_lab.pruning import PruningPlan

MOST_STEPS = 10**9


@dataclass(frozen=True)
class Arm:
    """An arm with nothing to turn: it meets the budget as it is, or not at all.

    Args:
        name: how messages and tables call it.
        config: the model's shape.
        n_context: tokens that may be pruned, per window.
        n_suffix: tokens after them, processed densely.
        plan: how it prunes; None is dense.
        head: logits for the scored positions (``scored``) or all that remain (``all``).
        protocol: ``suffix``, or ``full``, which prunes context and suffix alike and is acausal.
    """

    name: str
    config: ModelConfig
    n_context: int
    n_suffix: int
    plan: PruningPlan | None = None
    head: str = "scored"
    protocol: str = "suffix"

    @property
    def knob(self) -> str | None:
        """Name of what may be turned."""
        return None

    @property
    def value(self) -> float | int | None:
        """Where the knob stands."""
        return None

    @property
    def reach(self) -> tuple[float, float]:
        """Lowest and highest value of the knob; integers for a knob that counts something."""
        raise InputError(f"arm {self.name}: has nothing to turn")

    def turned(self, value: float) -> Arm:
        """The same arm with its knob at ``value``."""
        raise InputError(f"arm {self.name}: has nothing to turn")

    @property
    def keep_counts(self) -> list[int]:
        """Tokens entering each layer that may be pruned."""
        tokens = self.n_context + (self.n_suffix if self.protocol == "full" else 0)
        if self.plan is None:
            return [tokens] * self.config.n_layer
        return self.plan.schedule.counts(self.config.n_layer, tokens)

    def window(self) -> Breakdown:
        """FLOPs of one forward pass over one window."""
        if self.protocol == "full":
            return forward_flops(self.config, self.keep_counts, 0, self.plan, "all")
        return forward_flops(self.config, self.keep_counts, self.n_suffix, self.plan, self.head)

    @property
    def flops(self) -> int:
        """What the budget is compared with: inference over one window, unless a subclass says otherwise."""
        return self.window().total

    def is_below(self, upper: Arm) -> bool:
        """Whether turning the knob up to ``upper`` costs more, as it must."""
        return self.flops <= upper.flops


@dataclass(frozen=True)
class PrunedArm(Arm):
    """Turns the free parameter of its keep schedule.

    More of it never means fewer tokens, yet FLOPs may dip by the cost of a scoring: a layer whose count rounds to that
    of the next needs none. Hence :meth:`range_to`.
    """

    def __post_init__(self) -> None:
        if self.plan is None:
            raise InputError(f"arm {self.name}: a pruned arm needs a criterion and a schedule")

    @property
    def knob(self) -> str:
        return self.plan.schedule.knob

    @property
    def value(self) -> float | None:
        return getattr(self.plan.schedule, self.knob)

    @property
    def reach(self) -> tuple[float, float]:
        return self.plan.schedule.knob_range

    def turned(self, value: float) -> PrunedArm:
        plan = dataclasses.replace(self.plan, schedule=self.plan.schedule.with_knob(value))
        return dataclasses.replace(self, plan=plan)

    def is_below(self, upper: Arm) -> bool:
        """In every layer, since FLOPs themselves may dip."""
        return all(mine <= theirs for mine, theirs in zip(self.keep_counts, upper.keep_counts, strict=True))

    def range_to(self, upper: PrunedArm) -> tuple[int, int]:
        """Least and most FLOPs that any setting of the knob between this one and ``upper`` can have.

        A layer is scored for certain if even its lower count exceeds the higher count of the next, and possibly if its
        higher count exceeds the lower count of the next. Where more is kept more is protected, and less left to score.
        """
        fewest, most = self.keep_counts, upper.keep_counts
        least, largest = self._unscored(), upper._unscored()
        for layer in range(len(fewest) - 1):
            if fewest[layer] > most[layer + 1]:
                least += self._scoring(fewest[layer], most[layer + 1])
            if most[layer] > fewest[layer + 1]:
                largest += self._scoring(most[layer], fewest[layer + 1])
        return least, largest

    def _unscored(self) -> int:
        return sum(flops for (_, op), flops in self.window().entries.items() if op not in ("score", "select"))

    def _scoring(self, tokens: int, kept: int) -> int:
        return scoring_flops(self.config, self.plan, tokens, kept) + cost.select(tokens)


def _refuse_plan(arm: Arm) -> None:
    if arm.plan is not None:
        raise InputError(f"arm {arm.name}: is dense; it takes no criterion or schedule")


@dataclass(frozen=True)
class ShorterContextArm(Arm):
    """Dense; turns the length of its context, from 1 to the ``n_context`` it is given; the suffix stays."""

    longest: int | None = None

    def __post_init__(self) -> None:
        _refuse_plan(self)
        if self.longest is None:
            object.__setattr__(self, "longest", self.n_context)

    @property
    def knob(self) -> str:
        return "n_context"

    @property
    def value(self) -> int:
        return self.n_context

    @property
    def reach(self) -> tuple[int, int]:
        return 1, self.longest

    def turned(self, value: float) -> ShorterContextArm:
        return dataclasses.replace(self, n_context=int(value))


@dataclass(frozen=True)
class DenseArm(Arm):
    """Dense; turns its width (``turns = "d_model"``) or its depth (``"n_layer"``).

    The knob takes multiples of ``step`` up to ``most``; None is the least step that the config's layers allow (a
    Mamba-2 layer is made of whole heads), and what the config it is given has.
    """

    turns: str = "d_model"
    step: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        _refuse_plan(self)
        if self.turns not in ("d_model", "n_layer"):
            raise InputError(f"arm {self.name}: a dense arm turns d_model or n_layer, not {self.turns!r}")
        if self.most is None:
            object.__setattr__(self, "most", getattr(self.config, self.turns))
        least = self.config.width_step if self.turns == "d_model" else 1
        if self.step is None:
            object.__setattr__(self, "step", least)
        if not 1 <= self.step <= self.most:
            raise InputError(f"arm {self.name}: step must lie in 1..{self.most}, got {self.step}")
        if self.step % least:
            raise InputError(f"arm {self.name}: step must be a multiple of {least}, the width of whole heads")

    @property
    def knob(self) -> str:
        return self.turns

    @property
    def value(self) -> int:
        return getattr(self.config, self.turns)

    @property
    def reach(self) -> tuple[int, int]:
        return 1, self.most // self.step

    def turned(self, value: float) -> DenseArm:
        """``value`` counts steps, so that every integer in reach is allowed."""
        config = dataclasses.replace(self.config, **{self.turns: int(value) * self.step})
        return dataclasses.replace(self, config=config)


@dataclass(frozen=True)
class TrainedArm(Arm):
    """Turns how long it trains: FLOPs are forward + backward of ``steps`` batches of ``batch`` windows."""

    steps: int = 1
    batch: int = 1

    @property
    def knob(self) -> str:
        return "steps"

    @property
    def value(self) -> int:
        return self.steps

    @property
    def reach(self) -> tuple[int, int]:
        return 1, MOST_STEPS

    def turned(self, value: float) -> TrainedArm:
        return dataclasses.replace(self, steps=int(value))

    @property
    def flops(self) -> int:
        return self.steps * self.batch * self.window().training().total

    @property
    def tokens(self) -> int:
        """Training tokens read."""
        return self.steps * self.batch * (self.n_context + self.n_suffix)
