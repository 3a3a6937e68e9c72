"""Paired statistics against hand-computed cases and simulated data, and the sentences drawn from them."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import numpy as np
import pytest

from simba_lab.errors import InputError
from simba_lab.evaluate.conclusion import best_arm, conclude
from simba_lab.evaluate.statistics import Comparison, compare_all, holm, mean_interval, paired_comparison


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def compare(arm: Any, reference: Any, *rest: Any, n_resamples: int = 2000, seed: int = 0) -> Comparison:
    arrays = [None if x is None else np.asarray(x) for x in (arm, reference, *rest)]
    return paired_comparison(*arrays, n_resamples=n_resamples, rng=generator(seed))


def test_p_value_of_few_windows_is_the_enumerated_one() -> None:
    differences = np.array([3.0, 1.0, 2.0, -1.0, 4.0])
    reference = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    sums = [np.dot(signs, differences) for signs in product((1, -1), repeat=5)]
    two_sided = 2 * np.mean(np.array(sums) >= differences.sum())
    assert two_sided == 0.1875
    got = compare(reference + differences, reference)
    assert got.p_value == pytest.approx(two_sided)
    assert got.difference == pytest.approx(1.8)


def test_sampled_p_value_agrees_with_the_enumerated_one() -> None:
    differences = generator(5).normal(0.4, 1, 12)
    exact = compare(differences, np.zeros(12), n_resamples=2**12)
    sampled = compare(differences, np.zeros(12), n_resamples=2**12 - 1)
    assert exact.p_value is not None and 0.02 < exact.p_value < 0.8
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.03)


@pytest.mark.parametrize("swap", [False, True])
def test_swapping_the_arms_mirrors_the_difference(swap: bool) -> None:
    a, b = generator(1).normal(0, 1, 200), generator(2).normal(0.5, 1, 200)
    got = compare(b, a) if swap else compare(a, b)
    assert got.difference is not None and got.interval is not None and got.p_value is not None
    sign = 1 if swap else -1
    assert sign * got.difference > 0.3 and got.p_value < 0.01
    assert got.interval[0] < got.difference < got.interval[1]
    assert min(sign * end for end in got.interval) > 0


@pytest.mark.parametrize("documents", [8, 40])
def test_interval_covers_the_truth_with_documents_of_unequal_size(documents: int) -> None:
    """Windows share their document's effect: 95 % intervals must hold the true ratio about 95 times in 100."""
    draw = generator(documents)
    hits, trials, true = 0, 400, 0.03
    for _ in range(trials):
        member = np.repeat(np.arange(documents), draw.integers(2, 6, documents))
        tokens = draw.integers(0, 30, member.size)
        effect = true + draw.normal(0, 0.1, documents)[member] + draw.normal(0, 0.05, member.size)
        reference = draw.normal(3, 1, member.size) * tokens
        got = paired_comparison(
            reference + effect * tokens, reference, tokens, member, n_resamples=800, rng=draw
        ).interval
        assert got is not None
        hits += got[0] <= true <= got[1]
    assert 0.925 <= hits / trials <= 0.98


def test_p_values_under_no_difference_are_uniform() -> None:
    draw = generator(3)
    p_values = [
        paired_comparison(draw.normal(0, 1, 30), draw.normal(0, 1, 30), n_resamples=200, rng=draw).p_value
        for _ in range(400)
    ]
    below = [float(np.mean([p is not None and p <= level for p in p_values])) for level in (0.05, 0.5)]
    assert below[0] == pytest.approx(0.05, abs=0.03) and below[1] == pytest.approx(0.5, abs=0.08)


def test_resampling_documents_is_wider_than_pretending_that_windows_are_independent() -> None:
    document = np.repeat(np.arange(10), 20)
    arm = generator(4).normal(0.1, 1, 10)[document]
    naive, honest = compare(arm, np.zeros(200)), compare(arm, np.zeros(200), None, document)
    assert naive.interval and honest.interval and naive.p_value and honest.p_value
    assert np.ptp(honest.interval) > 3 * np.ptp(naive.interval)
    assert honest.p_value > naive.p_value
    assert honest.difference == pytest.approx(naive.difference)


def test_clusters_are_names_and_their_order_does_not_matter() -> None:
    values, document = generator(6).normal(0.2, 1, 60), np.repeat(np.arange(15), 4)
    order = generator(7).permutation(60)
    plain = compare(values, np.zeros(60), None, document)
    moved = compare(values[order], np.zeros(60), None, (document * 7 + 3)[order])
    assert moved.difference == pytest.approx(plain.difference)
    assert moved.interval == pytest.approx(plain.interval)
    assert moved.p_value == plain.p_value


def test_weights_make_a_ratio_of_sums() -> None:
    got = compare([6.0, 0.0, 30.0], [4.0, 0.0, 20.0], [2, 0, 4])
    assert got.difference == pytest.approx((2 + 10) / 6)
    means = compare([3.0, 7.5], [2.0, 5.0])
    assert means.difference == pytest.approx((1 + 2.5) / 2)


def test_windows_without_scored_tokens_change_nothing() -> None:
    values, tokens = generator(8).normal(0.1, 1, 40), generator(9).integers(1, 9, 40)
    with_empty = compare([*values, 0.0, 0.0], np.zeros(42), [*tokens, 0, 0])
    assert with_empty == compare(values, np.zeros(40), tokens)


def test_identical_arms_have_difference_zero_and_p_one() -> None:
    values = generator(10).normal(3, 1, 50)
    assert compare(values, values) == Comparison(0.0, (0.0, 0.0), 1.0)


def test_a_constant_difference_has_a_point_interval() -> None:
    got = compare(np.full(30, 2.5), np.full(30, 2.0))
    assert got.interval == (0.5, 0.5) and got.p_value is not None and got.p_value < 0.01


def test_nothing_scored_and_a_single_document_give_none_and_never_nan() -> None:
    zero = np.zeros(3)
    assert compare(zero, zero, [0, 0, 0]) == Comparison(None, None, None)
    assert compare([1.0, 2.0, 3.0], zero, None, [4, 4, 4]) == Comparison(2.0, None, None)
    nothing = mean_interval(zero, zero, rng=generator())
    assert nothing.mean is None and nothing.interval is None
    single = mean_interval(np.array([6.0]), np.array([4.0]), rng=generator())
    assert single.mean == 1.5 and single.interval is None


def test_mean_interval_matches_the_normal_one_on_many_windows() -> None:
    values = generator(11).normal(2, 1, 2000)
    got = mean_interval(values, rng=generator()).interval
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert got == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_higher_confidence_is_wider() -> None:
    values = generator(12).normal(0, 1, 60)
    narrow = paired_comparison(values, np.zeros(60), confidence=0.8, n_resamples=999, rng=generator()).interval
    wide = paired_comparison(values, np.zeros(60), confidence=0.99, n_resamples=999, rng=generator()).interval
    assert narrow and wide and wide[0] < narrow[0] < narrow[1] < wide[1]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([]) == []


def test_compare_all_corrects_over_the_other_arms_and_ignores_their_company() -> None:
    draw = generator(13)
    base = draw.normal(3, 1, 80)
    arms = {"base": base, "worse": base + draw.normal(0.2, 0.5, 80), "same": base + draw.normal(0, 0.5, 80)}
    together = compare_all(arms, "base", n_resamples=999)
    alone = compare_all({name: arms[name] for name in ("base", "worse")}, "base", n_resamples=999)
    assert set(together) == {"worse", "same"}
    assert together["worse"].interval == alone["worse"].interval
    assert together["worse"].p_value == pytest.approx(2 * alone["worse"].p_value)


@pytest.mark.parametrize(
    ("arm", "weights", "clusters", "says"),
    [
        ([1.0, np.nan], None, None, "window 1 is nan"),
        ([1.0], None, None, "same windows"),
        ([1.0, 2.0], [1, -1], None, "weights"),
        ([1.0, 2.0], [1, 1, 1], None, "weights"),
        ([1.0, 2.0], None, [0], "clusters"),
    ],
)
def test_bad_values_are_named(arm: Any, weights: Any, clusters: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        compare(arm, [0.0, 0.0], weights, clusters)


def test_an_unknown_reference_is_named() -> None:
    with pytest.raises(InputError, match="'dense'.*uniform"):
        compare_all({"uniform": np.zeros(3)}, "dense")


def test_a_whole_sweep_is_compared_in_seconds() -> None:
    draw = generator(14)
    base = draw.normal(3, 1, 1000)
    arms = {f"arm-{i}": base + draw.normal(0.001 * i, 0.2, 1000) for i in range(5)}
    start = time.perf_counter()
    compare_all(arms, "arm-0")
    # Two faces of 25 arms are twelve times this; the shared machine of a test run gets ample room.
    assert time.perf_counter() - start < 8


def arm(name: str, quality: float | None, kind: str = "pruned", **more: Any) -> dict[str, Any]:
    """An arm dict whose comparison with the first arm is clear: interval +-0.01, p = 0.002."""
    difference = more.pop("difference", None)
    interval = None if difference is None else [difference - 0.01, difference + 0.01]
    face = {"quality": quality, "difference": difference, "difference_interval": interval, "p_value": 0.002}
    far = {f"{key}_far": value for key, value in face.items() if key != "difference_interval"}
    base = {"name": name, "kind": kind, "matched": kind != "dense", "flops": 180 if kind == "dense" else 100}
    return {**base, **face, **far, "difference_far_interval": interval, **more}


def verdict(arms: list[dict[str, Any]], versus: dict[str, Comparison]) -> dict[str, Any]:
    return conclude(arms, versus, versus)


CLEAR = Comparison(0.05, (0.04, 0.06), 0.001)
UNCLEAR = Comparison(0.005, (-0.01, 0.02), 0.6)
SMALLER, SHORTER = arm("small", 3.0, "smaller_dense"), arm("short", 2.98, "shorter_context", difference=-0.02)


def test_a_pruned_arm_that_wins_is_said_to_beat_both_controls() -> None:
    arms = [SMALLER, SHORTER, arm("linear", 2.90, difference=-0.1), arm("uniform", 2.91, difference=-0.09)]
    got = verdict(arms, {"small": CLEAR, "short": CLEAR, "uniform": UNCLEAR})
    assert got["best"] == got["best_far"] == "linear"
    assert got["not_separable"] == got["not_separable_far"] == ["uniform"]
    assert "linear has the lowest NLL: 2.9000 nats/token" in got["sentence"]
    assert (
        "It beats the smaller dense model (small): difference -0.1000 nats/token, "
        "95 % interval -0.1100 to -0.0900, corrected p = 0.002." in got["sentence"]
    )
    assert "The same model on a shorter context (short) is worse than linear: difference +0.0500" in got["sentence"]
    assert "Not separable from the best (1 of 3): uniform." in got["sentence"]
    assert "beats the smaller dense model (small) on far tokens" in got["far_sentence"]


@pytest.mark.parametrize(
    "doubt", [{"p_value": 0.05}, {"difference_interval": [-0.2, 0.0]}, {"p_value": None, "difference_interval": None}]
)
def test_no_claim_without_both_a_p_value_and_an_interval(doubt: dict[str, Any]) -> None:
    got = verdict([SMALLER, arm("linear", 2.9, difference=-0.1, **doubt)], {"small": UNCLEAR})
    assert "It is not separable from the smaller dense model (small)" in got["sentence"]
    assert "beats" not in got["sentence"]
    assert "It beats" in got["far_sentence"], "the far numbers of this arm stay clear"


def test_a_losing_pruned_arm_is_said_to_lose_to_dense() -> None:
    got = verdict([SMALLER, arm("linear", 3.1, difference=0.1)], {"linear": CLEAR})
    assert got["best"] == "small" and got["not_separable"] == []
    assert "The best pruned arm, linear, loses to the smaller dense model (small)" in got["sentence"]


def test_a_losing_pruned_arm_is_said_to_lose_to_the_shorter_context() -> None:
    arms = [SMALLER, SHORTER, arm("linear", 2.99, difference=-0.01)]
    got = verdict(arms, {"small": UNCLEAR, "linear": CLEAR})
    assert got["best"] == "short" and got["not_separable"] == ["small"]
    assert "It beats the smaller dense model" in got["sentence"]
    assert "linear, loses to the same model on a shorter context (short): difference +0.0500" in got["sentence"]
    unsure = verdict(arms, {"small": UNCLEAR, "linear": UNCLEAR})
    assert "linear, is not separable from the same model on a shorter context" in unsure["sentence"]
    assert "None of the 2 other matched arms is separable" in unsure["sentence"]


def test_a_shorter_context_that_may_be_as_good_is_said_to_be() -> None:
    arms = [SMALLER, SHORTER, arm("linear", 2.97, difference=-0.03)]
    got = verdict(arms, {"small": CLEAR, "short": UNCLEAR})
    assert "The same model on a shorter context (short) is not separable from linear" in got["sentence"]


@pytest.mark.parametrize(
    ("quality", "comparison", "says"),
    [
        (2.5, Comparison(-0.4, (-0.5, -0.3), 0.001), "is better than linear"),
        (3.5, Comparison(0.6, (0.5, 0.7), 0.0001), "is worse than linear: difference +0.6000 nats/token"),
        (2.9, UNCLEAR, "is not separable from linear"),
    ],
)
def test_the_full_model_is_reported_with_its_price(quality: float, comparison: Comparison, says: str) -> None:
    arms = [SMALLER, arm("linear", 2.9, difference=-0.1), arm("dense", quality, "dense")]
    got = verdict(arms, {"small": CLEAR, "dense": comparison})
    assert got["best"] == "linear", "an arm outside the budget cannot win"
    assert f"The full dense model (dense), at 1.80 times the FLOPs, {says}" in got["sentence"]
    assert "dense" not in got["not_separable"]


def test_all_others_worse_is_said_once() -> None:
    arms = [SMALLER, arm("linear", 2.9, difference=-0.1), arm("uniform", 3.2, difference=0.2)]
    got = verdict(arms, {"small": CLEAR, "uniform": CLEAR})
    assert "All 2 other matched arms are separably worse." in got["sentence"]


def test_without_far_tokens_nothing_is_concluded_about_them() -> None:
    arms = [{**one, "quality_far": None} for one in (SMALLER, arm("linear", 2.9, difference=-0.1))]
    got = conclude(arms, {"small": CLEAR}, {})
    assert got["best_far"] is None and got["not_separable_far"] == [] and best_arm(arms, "quality_far") is None
    assert "nothing was scored on far tokens" in got["far_sentence"]


def test_a_single_matched_arm_has_no_rivals() -> None:
    got = verdict([SMALLER], {})
    assert got["best"] == "small" and "No other matched arm was measured." in got["sentence"]


def test_a_missing_comparison_is_never_taken_for_a_difference() -> None:
    got = verdict([SMALLER, arm("linear", 2.9, difference=-0.1)], {})
    assert got["not_separable"] == ["small"]
