"""From a sweep file to arms that all cost the same: everything that can be refused is refused here, before training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from simba_lab.budget import Arm, Budget, PrunedArm, ShorterContextArm, Solution, closest, match
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, SCHEDULES, PruningPlan, build_schedule
from simba_lab.sweep.config import ArmConfig, SweepConfig
from simba_lab.training import Experiment


@dataclass(frozen=True)
class PlannedArm:
    """An arm with its knob turned: what it is, which experiment's weights it uses, what it will cost."""

    name: str
    kind: str
    arm: Arm
    experiment: Experiment

    @property
    def matched(self) -> bool:
        return self.kind != "dense"

    @property
    def plan(self) -> PruningPlan | None:
        return self.arm.plan

    def spec(self) -> dict[str, Any]:
        """Plain data that decides the arm's numbers, the weights aside."""
        return {
            "name": self.name,
            "kind": self.kind,
            "model": self.arm.config.to_dict(),
            "pruning": None if self.plan is None else self.plan.spec(),
            "n_context": self.arm.n_context,
            "n_suffix": self.arm.n_suffix,
        }


@dataclass(frozen=True)
class SweepPlan:
    """All arms in the order of the file, the budget, and how far the equal-FLOPs shorter context sees."""

    budget: Budget
    arms: list[PlannedArm]
    reach: int

    @property
    def experiments(self) -> list[Experiment]:
        """Each experiment whose weights are needed, once."""
        return list({str(arm.experiment.folder): arm.experiment for arm in self.arms}.values())

    def solutions(self) -> list[Solution]:
        """The matched arms as the budget room knows them."""
        return [Solution(a.arm, a.arm.flops, a.arm.flops, a.arm.flops) for a in self.arms if a.matched]


def make_plan(config: SweepConfig, base: Experiment, others: dict[str, Experiment]) -> SweepPlan:
    """Turn every arm to the budget; ``others`` maps experiment files that arms name to what they describe.

    Raises BudgetMismatch naming each arm, its FLOPs and its distance if one cannot be matched, and InputError for a
    wrong arm.
    """
    drafts = [draft for entry in config.arms for draft in _drafts(entry, config, base, others)]
    names = [draft.name for draft in drafts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"arms: the name {twice[0]!r} is used twice; name one of them")
    budget = _budget(config, drafts)
    to_match = [draft for draft in drafts if draft.matched]
    solved = {s.arm.name: s.arm for s in match([draft.arm for draft in to_match], budget)}
    arms = [PlannedArm(d.name, d.kind, solved.get(d.name, d.arm), d.experiment) for d in drafts]
    return SweepPlan(budget, arms, _reach(arms, config, base, budget))


def _reach(arms: list[PlannedArm], config: SweepConfig, base: Experiment, budget: Budget) -> int:
    for arm in arms:
        if arm.kind == "shorter_context":
            return arm.arm.n_context
    whole = ShorterContextArm("reach", base.model.config, config.n_context, config.n_suffix)
    return closest(whole, budget).arm.n_context


def _budget(config: SweepConfig, drafts: list[PlannedArm]) -> Budget:
    if config.budget.flops is not None:
        return Budget(config.budget.flops, config.budget.tolerance)
    for draft in drafts:
        if draft.name == config.budget.reference:
            if draft.kind == "pruned" and draft.arm.value is None:
                raise InputError(f"budget.reference: arm {draft.name} must set {draft.arm.knob} to have a cost")
            whole, share = Budget.of(draft.arm, config.budget.tolerance), config.budget.share
            return whole if share == 1 else whole.part(share)
    raise InputError(f"budget.reference: no arm is called {config.budget.reference!r}")


def _drafts(
    entry: ArmConfig, config: SweepConfig, base: Experiment, others: dict[str, Experiment]
) -> Iterator[PlannedArm]:
    sizes = {"n_context": config.n_context, "n_suffix": config.n_suffix}
    experiment = base if entry.experiment is None else others[entry.experiment]
    if entry.kind == "pruned":
        yield from _pruned(entry, sizes, experiment)
        return
    scored = entry.criterion is not None or entry.schedule is not None
    if scored or entry.protect_recent or entry.convolution != "compacted":
        raise InputError(f"arms: a {entry.kind} arm takes no criterion, schedule, protect_recent or convolution")
    name = entry.name or entry.kind + _origin(entry)
    if entry.kind == "smaller_dense" and entry.experiment is None:
        raise InputError(f"arms: {name} needs experiment, the file that trains it")
    cls = ShorterContextArm if entry.kind == "shorter_context" else Arm
    yield PlannedArm(name, entry.kind, cls(name, experiment.model.config, **sizes), experiment)


def _pruned(entry: ArmConfig, sizes: dict[str, int], experiment: Experiment) -> Iterator[PlannedArm]:
    if entry.criterion is None or entry.schedule is None:
        raise InputError("arms: a pruned arm needs criterion and schedule")
    pairs = list(product(_several(entry.schedule), _several(entry.criterion)))
    if entry.name is not None and len(pairs) > 1:
        raise InputError(f"arms: {entry.name!r} stands for {len(pairs)} arms; leave the name out")
    for schedule, criterion in pairs:
        plan = PruningPlan(CRITERIA.build(criterion), build_schedule(schedule), entry.protect_recent, entry.convolution)
        name = entry.name or arm_name(plan, schedule) + _origin(entry)
        yield PlannedArm(name, "pruned", PrunedArm(name, experiment.model.config, plan=plan, **sizes), experiment)


def _origin(entry: ArmConfig) -> str:
    """What tells arms of other weights from those of the sweep's own, in names made here."""
    return "" if entry.experiment is None or entry.kind == "smaller_dense" else f" of {Path(entry.experiment).stem}"


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def arm_name(plan: PruningPlan, schedule_spec: Any = None) -> str:
    """``schedule:criterion``, options that were set behind: ``linear:random(seed=1)+recent(0.5)+adjacent``."""
    given = {} if schedule_spec is None else SCHEDULES.parse(schedule_spec)[1]
    criterion = CRITERIA.spec(plan.criterion)["init_args"]
    defaults = {key: parameter.default for key, parameter in CRITERIA.arguments(type(plan.criterion)).items()}
    set_here = {key: value for key, value in criterion.items() if value != defaults[key]}
    schedule, _, scores = plan.name.partition(":")
    recent = f"+recent({plan.protect_recent:g})" if plan.protect_recent else ""
    adjacent = "" if plan.convolution == "compacted" else f"+{plan.convolution}"
    return f"{schedule}{_bracketed(given)}:{scores}{_bracketed(set_here)}{recent}{adjacent}"


def _bracketed(options: dict[str, Any]) -> str:
    return f"({','.join(f'{key}={_shown(value)}' for key, value in options.items())})" if options else ""


def _shown(value: Any) -> str:
    """A part's spec within an option as the part is called: ``norm``, ``global_impact(reduce=l2)``."""
    if isinstance(value, dict) and "class_path" in value:
        return value["class_path"].rpartition(".")[2] + _bracketed(value.get("init_args") or {})
    return str(value)


def model_of(arm: PlannedArm, weights: LanguageModel) -> LanguageModel:
    """The arm's model: its experiment's weights with its pruning."""
    return weights.with_pruning(arm.plan)
