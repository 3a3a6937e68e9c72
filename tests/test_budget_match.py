"""Matching arms to one budget: whatever can be met is met within tolerance, whatever cannot is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simba_lab.budget import (
    Arm,
    Budget,
    DenseArm,
    PrunedArm,
    ShorterContextArm,
    TrainedArm,
    check_realised,
    closest,
    match,
    solve,
)
from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import CRITERIA, SCHEDULES, KeepSchedule, PruningPlan

TINY = ModelConfig(d_model=4, n_layer=2, vocab_size=10, d_state=2, d_conv=3)
BASE = ModelConfig(d_model=64, n_layer=8, vocab_size=64)


class Falling(KeepSchedule):
    """Keeps less when its knob is turned up."""

    knob = "waste"

    def __init__(self, waste: float | None = None) -> None:
        self.waste = waste

    def shares(self, n_layers: int) -> list[float]:
        return [1.0] + [1.0 - 0.9 * self.waste] * (n_layers - 1)


def pruned(name: str, schedule: str = "linear", n_context: int = 512, **options: Any) -> PrunedArm:
    plan = PruningPlan(CRITERIA.build("global_impact"), SCHEDULES.construct(SCHEDULES.resolve(schedule), options))
    return PrunedArm(name, BASE, n_context, 16, plan)


def test_all_kinds_of_arms_meet_one_budget() -> None:
    reference = Arm("smaller", ModelConfig(48, 8, 64), 512, 16)
    budget = Budget.of(reference)
    assert budget.flops == LanguageModel(reference.config).flops(512, 16).total
    assert budget.reference == "the arm smaller"
    arms = [
        reference,
        pruned("linear"),
        pruned("uniform", "uniform"),
        pruned("highway", "highway_top"),
        pruned("knots", "knots", values=[0.8, 0.1]),
        ShorterContextArm("shorter", BASE, 512, 16),
        DenseArm("narrow", BASE, 512, 16, most=128),
        DenseArm("shallow", ModelConfig(48, 20, 64), 512, 16, turns="n_layer"),
    ]
    solutions = match(arms, budget)
    assert [s.arm.name for s in solutions] == [arm.name for arm in arms]
    assert solutions[0].flops == budget.flops
    for solution in solutions:
        assert abs(solution.flops - budget.flops) <= 0.005 * budget.flops
        assert solution.flops == solution.arm.flops == solution.arm.window().total
    assert solutions[-2].arm.config == reference.config
    assert solutions[-1].arm.config.n_layer == 8
    assert len({type(s.arm.plan.schedule) for s in solutions if s.arm.plan}) == 4


def test_the_closest_integer_is_taken() -> None:
    arm = DenseArm("shallow", BASE, 100, 10, turns="n_layer")
    costs = {depth: arm.turned(depth).flops for depth in range(1, 9)}
    for target in (costs[3] + 1, costs[3] * 1.1, costs[5] - 1, 1, 10 * costs[8]):
        solution = closest(arm, Budget(int(target)))
        assert solution.arm.config.n_layer == min(costs, key=lambda depth: abs(costs[depth] - int(target)))
        assert (solution.lowest, solution.highest) == (costs[1], costs[8])


def test_width_moves_in_steps() -> None:
    arm = DenseArm("narrow", ModelConfig(96, 2, 64), 50, 4, step=16, most=160)
    assert closest(arm, Budget(arm.turned(5).flops + 3)).arm.config.d_model == 80
    assert closest(arm, Budget(10**12)).arm.config.d_model == 160


def test_training_steps_are_matched_by_forward_and_backward() -> None:
    dense = TrainedArm("dense", BASE, 1, 255, head="all", steps=200, batch=4)
    assert dense.flops == 200 * 4 * 3 * LanguageModel(BASE).flops(1, 255, head="all").total
    plan = pruned("x", final_keep=0.1).plan
    sparse = TrainedArm("sparse", BASE, 240, 16, plan, batch=4)
    solution = solve(sparse, Budget.of(dense))
    assert solution.arm.steps > 200
    assert solution.arm.tokens == solution.arm.steps * 4 * 256
    one_step = sparse.turned(1).flops
    assert abs(solution.flops - dense.flops) <= one_step / 2


@st.composite
def pruned_arms(draw: st.DrawFn) -> PrunedArm:
    config = ModelConfig(draw(st.integers(2, 40)), draw(st.integers(2, 9)), 16, d_state=draw(st.integers(1, 16)))
    name = draw(st.sampled_from(SCHEDULES.names()))
    options: dict[str, Any] = {"multiple_of": draw(st.sampled_from([1, 1, 8]))}
    if name == "knots":
        falling = sorted(draw(st.lists(st.floats(0.05, 1), min_size=1, max_size=4)), reverse=True)
        options |= {"values": falling}
    if name == "calibrated":
        rows = st.lists(st.floats(-1, 1), min_size=2, max_size=2)
        options |= {"rates": [0.5, 0.1], "rise": draw(st.lists(rows, min_size=1, max_size=6))}
    schedule = SCHEDULES.construct(SCHEDULES.resolve(name), options)
    skipping = {"class_path": "lookahead_impact", "init_args": {"skip_protected": True}}
    criterion = CRITERIA.build(draw(st.sampled_from([*CRITERIA.names(), skipping])))
    plan = PruningPlan(criterion, schedule, draw(st.sampled_from([0.0, 0.5, 0.97])))
    return PrunedArm("arm", config, draw(st.integers(1, 70)), draw(st.integers(0, 9)), plan)


@given(arm=pruned_arms(), place=st.floats(0, 1))
@settings(max_examples=60)
def test_any_feasible_budget_is_met(arm: PrunedArm, place: float) -> None:
    low, high = arm.reach
    budget = Budget(arm.turned(low + place * (high - low)).flops)
    solution = solve(arm, budget)
    assert budget.admits(solution.flops)
    assert solution.flops == solution.arm.flops


@given(arm=pruned_arms(), below=st.booleans())
@settings(max_examples=30)
def test_any_infeasible_budget_is_refused(arm: PrunedArm, below: bool) -> None:
    low, high = map(arm.turned, arm.reach)
    least, most = low.range_to(high)
    budget = Budget(int(0.99 * least) if below else int(1.01 * most) + 1)
    with pytest.raises(BudgetMismatch, match="1 of 1 arms cannot meet"):
        solve(arm, budget)


@given(arm=pruned_arms(), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)), between=st.floats(0, 1))
def test_the_range_between_two_settings_holds_what_lies_between(
    arm: PrunedArm, ends: tuple[float, float], between: float
) -> None:
    start, width = arm.reach[0], arm.reach[1] - arm.reach[0]
    low, high = (arm.turned(start + place * width) for place in sorted(ends))
    inside = arm.turned(start + (min(ends) + between * abs(ends[1] - ends[0])) * width)
    least, most = low.range_to(high)
    assert least <= inside.flops <= most
    assert low.is_below(inside) and inside.is_below(high)
    assert low.range_to(low) == (low.flops, low.flops)


@given(arm=pruned_arms(), share=st.floats(0, 1))
@settings(max_examples=30)
def test_a_refused_arm_has_no_better_place(arm: PrunedArm, share: float) -> None:
    low, high = arm.reach
    reachable = [arm.turned(low + place / 300 * (high - low)).flops for place in range(301)]
    budget = Budget(int(min(reachable) + share * (max(reachable) - min(reachable))), tolerance=0.001)
    assert budget.admits(closest(arm, budget).flops) or not any(map(budget.admits, reachable))


@given(small=st.floats(0.55, 1), large=st.floats(0.55, 1))
@settings(max_examples=20)
def test_a_larger_budget_never_turns_a_knob_down(small: float, large: float) -> None:
    small, large = sorted((small, large))
    full = Arm("dense", BASE, 512, 16).flops
    for arm in (pruned("p"), ShorterContextArm("s", BASE, 512, 16), DenseArm("d", BASE, 512, 16)):
        values = [closest(arm, Budget(int(share * full))).arm.value for share in (small, large)]
        assert values[0] <= values[1] + 1e-9


def test_scoring_that_falls_away_does_not_confuse_the_solver() -> None:
    """Keeping 399 of 400 tokens needs a scoring and costs more than keeping all; both must be reachable."""
    arm = pruned("arm", "uniform", n_context=400)
    dense, nearly = arm.turned(1.0).flops, arm.turned(0.9975).flops
    assert arm.turned(0.9975).keep_counts[1] == 399
    assert nearly > dense
    for target in (dense, nearly):
        assert solve(arm, Budget(target, tolerance=1e-6)).flops == target


def test_a_budget_that_bisection_steps_over_is_met() -> None:
    """FLOPs pass this budget more than once; where bisection ends they jump from 2 % below it to above it."""
    plan = PruningPlan(CRITERIA.build("global_impact"), SCHEDULES.construct(SCHEDULES.resolve("geometric"), {}))
    arm = PrunedArm("arm", ModelConfig(4, 6, 16), 64, 2, plan)
    budget = Budget(arm.turned(0.9192155606809305).flops, tolerance=0.001)
    assert solve(arm, budget).flops == budget.flops


def test_one_message_names_every_arm_its_flops_and_its_distance() -> None:
    shallow = DenseArm("shallow", TINY, 5, 2, turns="n_layer")
    arms = [ShorterContextArm("short", TINY, 50, 2), shallow, Arm("as it is", TINY, 5, 2)]
    budget = Budget(6200, 0.01, "a round number")
    with pytest.raises(BudgetMismatch) as caught:
        match(arms, budget)
    assert caught.value.exit_code == 3
    assert str(caught.value).splitlines() == [
        "2 of 3 arms cannot meet the budget 6,200 FLOPs (a round number), tolerance 1 %; nothing has run",
        "  shallow: n_layer = 2 costs 7,104 FLOPs, 14.58 % above the budget; NOT MATCHED, "
        "n_layer reaches 3,744 to 7,104 FLOPs",
        "  as it is: costs 7,104 FLOPs, 14.58 % above the budget; NOT MATCHED, it has nothing to turn",
        "  short: n_context = 4 costs 6,144 FLOPs, 0.9032 % below the budget; matched",
    ]


def test_a_knob_that_costs_less_when_turned_up_is_refused() -> None:
    plan = PruningPlan(CRITERIA.build("norm"), Falling())
    with pytest.raises(InputError, match="arm upside_down: its cost falls .* while waste rises from .* to 1"):
        solve(PrunedArm("upside_down", BASE, 64, 4, plan), Budget(100_000_000))


def test_realised_flops_must_be_the_planned_ones() -> None:
    arms = [Arm(name, TINY, 5, 2) for name in ("kept", "drifted", "lost")]
    solutions = match(arms, Budget(7104))
    check_realised(solutions, {"kept": 7104, "drifted": 7104, "lost": 7104}, Budget(7104))
    with pytest.raises(BudgetMismatch) as caught:
        check_realised(solutions, {"kept": 7104, "drifted": 7105}, Budget(7104))
    head, drifted, lost = str(caught.value).splitlines()
    assert head.startswith("2 of 3 arms did not keep to the budget 7,104 FLOPs")
    assert "drifted: ran 7,105 FLOPs, 0.01408 % above the budget, but 7,104 FLOPs were planned" in drifted
    assert "lost: has no ledger" in lost
    with pytest.raises(BudgetMismatch, match="kept: ran 7,104 FLOPs, 1.486 % above the budget"):
        check_realised(solutions, dict.fromkeys(("kept", "drifted", "lost"), 7104), Budget(7000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Budget(0), "budget.flops must be at least 1"),
        (lambda: Budget(10, 1.5), r"budget.tolerance must lie in \[0, 1\)"),
        (lambda: match([Arm("a", TINY, 5, 2)] * 2, Budget(7104)), "the name 'a' is used twice"),
        (lambda: DenseArm("a", TINY, 5, 2, turns="expand"), "turns d_model or n_layer, not 'expand'"),
        (lambda: PrunedArm("a", TINY, 5, 2), "arm a: a pruned arm needs a criterion"),
        (lambda: Arm("a", TINY, 5, 2).turned(3), "arm a: has nothing to turn"),
    ],
)
def test_impossible_requests_are_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
