"""Keep schedules: one contract over all of them, exact small cases, and every mistake named."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simba_lab.errors import InputError
from simba_lab.pruning import SCHEDULES, KeepSchedule, PruningPlan, build_schedule

# Options every schedule needs besides its free parameter.
OPTIONS = {
    "uniform": [{}],
    "linear": [{}],
    "geometric": [{}],
    "highway_top": [{}, {"from_layer": 1}, {"from_layer": 0.25}],
    "knots": [{"values": [0.3]}, {"values": [1.0, 0.6, 0.6, 0.05]}, {"values": [0.1, 0.1]}],
    "calibrated": [
        {"rates": [0.5], "rise": [[0.1]]},
        {"rates": [0.5, 0.25, 0.1], "rise": [[0.3, 0.5, 0.9], [0.1, 0.05, 0.4], [-0.01, 0.0, 0.2], [0.02, 0.01, 0.0]]},
        {"rates": [0.9, 0.01], "rise": [[0.0, 0.0]] * 3},
    ],
}
CASES = [(name, options) for name, variants in OPTIONS.items() for options in variants]
every_schedule = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
shares = st.floats(1e-6, 1.0)
depths = st.integers(3, 40)


def make(name: str, options: dict, knob: float, multiple_of: int = 1, every: int = 1) -> KeepSchedule:
    cls = SCHEDULES.resolve(name)
    return SCHEDULES.construct(cls, {**options, cls.knob: knob, "multiple_of": multiple_of, "every": every})


def test_every_registered_schedule_is_under_contract() -> None:
    assert sorted(OPTIONS) == SCHEDULES.names()


@every_schedule
@given(
    knob=shares, n_layers=depths, n_context=st.integers(1, 3000), multiple=st.sampled_from([1, 3, 8, 64]),
    every=st.integers(1, 5),
)  # fmt: skip
def test_counts_fall_from_the_whole_context_and_never_below_one(
    name: str, options: dict, knob: float, n_layers: int, n_context: int, multiple: int, every: int
) -> None:
    counts = make(name, options, knob, multiple, every).counts(n_layers, n_context)
    assert all(lower == upper for i, (lower, upper) in enumerate(zip(counts, counts[1:], strict=False)) if i % every)
    assert len(counts) == n_layers and all(type(count) is int for count in counts)
    assert counts[0] == n_context
    assert all(lower >= upper >= 1 for lower, upper in zip(counts, counts[1:], strict=False))
    assert all(count % multiple == 0 or count == n_context for count in counts)


@every_schedule
@given(knobs=st.tuples(shares, shares), n_layers=depths, n_context=st.integers(1, 500))
def test_more_of_the_knob_never_keeps_fewer(
    name: str, options: dict, knobs: tuple[float, float], n_layers: int, n_context: int
) -> None:
    few, many = (make(name, options, knob).counts(n_layers, n_context) for knob in sorted(knobs))
    assert all(a <= b for a, b in zip(few, many, strict=True))


@every_schedule
def test_the_whole_knob_keeps_everything_and_its_least_almost_nothing(name: str, options: dict) -> None:
    schedule = make(name, options, 1.0)
    assert schedule.counts(6, 37) == [37] * 6
    low, high = schedule.knob_range
    assert high == 1.0 and schedule.with_knob(low).counts(6, 37)[-1] == 1


@every_schedule
@given(place=st.floats(0.01, 1.0), n_layers=depths)
def test_mean_keep_is_met_to_rounding(name: str, options: dict, place: float, n_layers: int) -> None:
    schedule = make(name, options, 0.5)
    least = sum(schedule.with_knob(schedule.knob_range[0]).shares(n_layers)) / n_layers
    mean_keep = least + place * (1 - least)
    counts = schedule.with_mean_keep(mean_keep, n_layers).counts(n_layers, 10_000)
    assert sum(counts) / n_layers / 10_000 == pytest.approx(mean_keep, abs=1e-4)


@every_schedule
def test_a_spec_round_trip_keeps_the_counts(name: str, options: dict) -> None:
    schedule = make(name, options, 0.4, multiple_of=2)
    assert SCHEDULES.build(SCHEDULES.spec(schedule)).counts(7, 101) == schedule.counts(7, 101)
    assert schedule.with_knob(0.9).counts(7, 101) == make(name, options, 0.9, 2).counts(7, 101)


@pytest.mark.parametrize(
    ("spec", "arguments", "n_layers", "n_context", "counts"),
    [
        ("linear", {"final_keep": 0.1}, 10, 10, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("linear", {"final_keep": 0.1}, 4, 10, [10, 7, 4, 1]),
        ("linear", {"final_keep": 0.5}, 3, 7, [7, 5, 3]),
        ("linear", {"final_keep": 0.1}, 1, 10, [10]),
        ("linear", {"final_keep": 0.01}, 5, 3, [3, 2, 2, 1, 1]),
        ("uniform", {"keep": 0.4}, 4, 10, [10, 4, 4, 4]),
        ("uniform", {"keep": 0.4, "multiple_of": 8}, 3, 100, [100, 40, 40]),
        ("uniform", {"keep": 0.41, "multiple_of": 8}, 3, 100, [100, 48, 48]),
        ("uniform", {"keep": 0.9, "multiple_of": 64}, 3, 100, [100, 100, 100]),
        ("geometric", {"final_keep": 0.125}, 4, 80, [80, 40, 20, 10]),
        ("highway_top", {"keep": 0.2}, 6, 10, [10, 10, 10, 2, 2, 2]),
        ({"class_path": "highway_top", "init_args": {"from_layer": 1}}, {"keep": 0.2}, 4, 10, [10, 2, 2, 2]),
        ({"class_path": "knots", "init_args": {"values": [0.8, 0.2]}}, {}, 5, 10, [10, 9, 8, 5, 2]),
        ({"class_path": "knots", "init_args": {"values": [0.5]}}, {}, 3, 20, [20, 15, 10]),
        ({"class_path": "knots", "init_args": {"values": [0.5, 0.5], "stretch": 1 / 3}}, {}, 3, 100, [100, 25, 25]),
        ("linear", {"final_keep": 0.1, "every": 2}, 10, 100, [100, 85, 85, 65, 65, 45, 45, 25, 25, 10]),
        ("linear", {"final_keep": 0.1, "every": 99}, 10, 100, [100] + [50] * 9),
    ],
)
def test_exact_counts(spec: str | dict, arguments: dict, n_layers: int, n_context: int, counts: list[int]) -> None:
    assert build_schedule(spec, **arguments).counts(n_layers, n_context) == counts


@given(values=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=9), n_layers=st.integers(2, 40), stretch=shares)
def test_any_falling_curve_of_knots_gives_falling_counts(values: list[float], n_layers: int, stretch: float) -> None:
    schedule = build_schedule({"class_path": "knots", "init_args": {"values": sorted(values, reverse=True)}})
    counts = schedule.with_knob(stretch).counts(n_layers, 997)
    assert all(lower >= upper for lower, upper in zip(counts, counts[1:], strict=False))


def calibrated(rates: list[float], rise: list[list[float]], keep: float, n_layers: int) -> list[float]:
    spec = {"class_path": "calibrated", "init_args": {"rates": rates, "rise": rise}}
    return [round(share, 9) for share in build_schedule(spec, keep=keep).shares(n_layers)]


def test_a_calibrated_schedule_keeps_tokens_where_they_are_missed_most() -> None:
    """One rate: half of the tokens may be dropped at layer 1, 2 or 3 (of 4), or never, for 12, 2, 1 and 0.

    The hull goes from 12 to 2 in one layer, then to 0 in two: 10 a layer before 1 a layer.
    """
    rise = [[12.0], [2.0], [1.0]]
    curves = {0.25: [0.25] * 3, 0.5: [0.5] * 3, 7 / 12: [0.75, 0.5, 0.5], 2 / 3: [1, 0.5, 0.5], 5 / 6: [1, 0.75, 0.75]}
    for keep, curve in curves.items():
        assert calibrated([0.5], rise, keep, 4) == pytest.approx([1.0, *curve])


def test_a_calibrated_schedule_spends_on_the_slice_that_gives_most_for_a_token_and_layer() -> None:
    """A slice of 0.6 missed by 6, and one of 0.2 missed by 4, in the only layer that prunes: the narrow one first."""
    assert calibrated([0.4, 0.2], [[6.0, 10.0]], 0.4, 2) == [1.0, 0.4]
    assert calibrated([0.4, 0.2], [[6.0, 10.0], [0.0, 0.0]], 0.35, 3) == [1.0, 0.5, 0.2]
    assert calibrated([0.4, 0.2], [[6.0, 10.0], [5.9, 5.9]], 0.45, 3) == pytest.approx([1.0, 0.55, 0.35])


def test_noise_in_a_calibration_is_ironed_out() -> None:
    """A cut that seems to help, or to hurt less than a milder or a later one, does not."""
    noisy, clean = [[0.1, 0.05], [0.3, 0.2], [-0.2, -0.1]], [[0.3, 0.3], [0.3, 0.3], [0.0, 0.0]]
    for keep in (0.1, 0.3, 0.6, 0.9):
        assert calibrated([0.5, 0.2], noisy, keep, 4) == calibrated([0.5, 0.2], clean, keep, 4)


def test_a_calibration_is_carried_to_another_depth() -> None:
    """Layers 1 and 2 of 5 become 1 to 5 of 9, in the last of which the table stands half-way, at 2."""
    few, many = (calibrated([0.5], [[3.0], [3.0], [1.0], [1.0]], 0.75, n_layers) for n_layers in (5, 9))
    assert few == [1, 1, 1, 0.5, 0.5]
    assert many == [1, *[0.9] * 5, *[0.5] * 3]


def test_every_holds_the_mean() -> None:
    """The mean keep, and so nearly the FLOPs, stay; there is less to score."""
    smooth, stairs = (build_schedule("linear", every=every).with_mean_keep(0.6, 13) for every in (1, 4))
    assert sum(smooth.counts(13, 1000)) == pytest.approx(sum(stairs.counts(13, 1000)), abs=8)
    assert len(set(stairs.counts(13, 1000))) == 4


class FromUser(KeepSchedule):
    """A schedule of the user's: one curve, no free parameter worth turning."""

    knob = "scale"

    def __init__(self, curve: list[float], scale: float = 1.0) -> None:
        self.curve, self.scale = curve, scale

    def shares(self, n_layers: int) -> Sequence[float]:
        return [share * self.scale if layer else 1.0 for layer, share in enumerate(self.curve)]


def from_user(curve: list[float]) -> KeepSchedule:
    return build_schedule({"class_path": f"{__name__}.FromUser", "init_args": {"curve": curve}})


def test_a_users_schedule_works_by_class_path() -> None:
    schedule = from_user([1.0, 0.5, 0.25])
    assert schedule.counts(3, 8) == [8, 4, 2]
    assert schedule.with_mean_keep(0.5, 3).counts(3, 60) == [60, 20, 10]
    assert PruningPlan.build(3, "norm", schedule).name == "FromUser:norm"


def test_a_curve_that_rises_by_rounding_error_alone_does_not_rise_in_counts() -> None:
    assert from_user([1.0, 0.5 - 1e-14, 0.5 + 1e-14]).counts(3, 5) == [5, 2, 2]


@pytest.mark.parametrize(
    ("curve", "says"),
    [
        ([1.0, 0.3, 0.4], "rises with depth: [1, 0.3, 0.4]"),
        ([1.0, 0.3], "needs 3 shares"),
        ([1.0, 0.3, 0.2, 0.1], "needs 3 shares"),
        ([1.0, 1.2, 0.4], "(0, 1]"),
        ([1.0, 0.3, 0.0], "(0, 1]"),
        ([1.0, 0.3, float("nan")], "(0, 1]"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(curve: list[float], says: str) -> None:
    with pytest.raises(InputError, match="schedule .*FromUser") as caught:
        from_user(curve).counts(3, 10)
    assert says in str(caught.value)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, float("nan"), float("inf"), "half"])
@pytest.mark.parametrize("name", SCHEDULES.names())
def test_a_share_out_of_range_names_its_key(name: str, share: object) -> None:
    knob = SCHEDULES.resolve(name).knob
    with pytest.raises(InputError, match=f"schedule {name}.*{knob}.*\\(0, 1\\]"):
        build_schedule({"class_path": name, "init_args": OPTIONS[name][0]}, **{knob: share})


@pytest.mark.parametrize("mean_keep", [0.0, 1.5, -1.0, float("nan"), "half"])
def test_a_mean_keep_out_of_range_is_named(mean_keep: object) -> None:
    with pytest.raises(InputError, match="mean_keep"):
        build_schedule("linear").with_mean_keep(mean_keep, 4)


@pytest.mark.parametrize("name", ["uniform", "linear", "geometric", "highway_top", "calibrated"])
def test_an_unset_knob_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"schedule {name}: {SCHEDULES.resolve(name).knob} is not set"):
        build_schedule({"class_path": name, "init_args": OPTIONS[name][0]}).counts(4, 10)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"class_path": "linear", "init_args": {"final_keep": 0.1, "multiple_of": 0}}, "multiple_of"),
        ({"class_path": "linear", "init_args": {"final_keep": 0.1, "multiple_of": 2.5}}, "multiple_of"),
        ({"class_path": "linear", "init_args": {"final_keep": 0.1, "every": 0}}, "every must be an integer"),
        ({"class_path": "calibrated", "init_args": {"rates": [], "rise": [[]]}}, "rates must hold"),
        ({"class_path": "calibrated", "init_args": {"rates": [0.2, 0.5], "rise": [[0, 1]]}}, "rates must fall"),
        ({"class_path": "calibrated", "init_args": {"rates": [1.0], "rise": [[0]]}}, "rates must fall"),
        ({"class_path": "calibrated", "init_args": {"rates": [0.5, -1], "rise": [[0, 1]]}}, "rates[1]"),
        ({"class_path": "calibrated", "init_args": {"rates": [0.5], "rise": []}}, "rise must hold one row"),
        ({"class_path": "calibrated", "init_args": {"rates": [0.5], "rise": [[0], [1, 2]]}}, "rise[1] must hold 1"),
        ({"class_path": "calibrated", "init_args": {"rates": [0.5], "rise": [[float("nan")]]}}, "rise[0] must hold 1"),
        ({"class_path": "linear", "init_args": {"final_kep": 0.1}}, "final_kep"),
        ({"class_path": "highway_top", "init_args": {"keep": 0.1, "from_layer": 0}}, "from_layer"),
        ({"class_path": "highway_top", "init_args": {"keep": 0.1, "from_layer": 2.5}}, "from_layer"),
        ({"class_path": "knots", "init_args": {"values": []}}, "values"),
        ({"class_path": "knots", "init_args": {"values": [0.5, 1.5]}}, "values[1]"),
        ("knots", "values"),
        ("linaer", "did you mean linear"),
    ],
)
def test_a_wrong_option_is_named(spec: str | dict, says: str) -> None:
    with pytest.raises(InputError) as caught:
        build_schedule(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(("n_layers", "n_context"), [(0, 5), (4, 0), (-1, 5), (4, -3)])
def test_sizes_below_one_are_refused(n_layers: int, n_context: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        build_schedule("linear", final_keep=0.1).counts(n_layers, n_context)


def test_rising_knots_and_a_highway_above_the_roof_are_refused() -> None:
    with pytest.raises(InputError, match="rises with depth"):
        build_schedule({"class_path": "knots", "init_args": {"values": [0.2, 0.4]}}).counts(5, 100)
    with pytest.raises(InputError, match="from_layer 9 leaves no layer of 8"):
        build_schedule({"class_path": "highway_top", "init_args": {"from_layer": 9}}, keep=0.5).counts(8, 100)


def test_a_mean_keep_that_cannot_be_reached_names_the_reach() -> None:
    with pytest.raises(InputError, match="mean_keep 0.3 is out of its reach on 4 layers, which is 0.501 to 1.000"):
        build_schedule("highway_top").with_mean_keep(0.3, 4)


def test_plans_take_a_mean_or_the_knob_but_not_both() -> None:
    assert PruningPlan.build(10, "norm", "linear", mean_keep=0.55).schedule.final_keep == pytest.approx(0.1, abs=1e-9)
    with pytest.raises(InputError, match="mean_keep or final_keep, not both"):
        PruningPlan.build(10, "norm", "linear", mean_keep=0.55, final_keep=0.1)
    with pytest.raises(InputError, match="mean_keep or final_keep, not both"):
        PruningPlan.build(10, "norm", {"class_path": "linear", "init_args": {"final_keep": 0.1}}, mean_keep=0.55)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_protect_recent_out_of_range_is_named(share: float) -> None:
    with pytest.raises(InputError, match="protect_recent"):
        PruningPlan.build(4, "norm", "linear", final_keep=0.1, protect_recent=share)


def test_a_plan_is_plain_data_and_back() -> None:
    criterion = {"class_path": "random", "init_args": {"seed": 3}}
    plan = PruningPlan.build(8, criterion, "geometric", final_keep=0.2, protect_recent=0.25)
    spec = plan.spec()
    assert spec["criterion"] == criterion and spec["protect_recent"] == 0.25
    again = PruningPlan.from_spec(spec)
    assert again.spec() == spec and again.schedule.counts(8, 100) == plan.schedule.counts(8, 100)
    for broken in ({}, {"criterion": "norm"}, {**spec, "protect": 1}):
        with pytest.raises(InputError, match="pruning: expected"):
            PruningPlan.from_spec(broken)
