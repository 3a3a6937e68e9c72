"""Window scoring against a loop over single tokens, its faces against counting by hand, and the eval command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import simba_lab
from simba_lab.data import EvalWindows
from simba_lab.data.evidence import find_last_occurrence
from simba_lab.errors import InputError
from simba_lab.evaluate.arms import evaluate_arms, parse_arm
from simba_lab.evaluate.windows import Face, by_distance, distance_edges, far_face, plain_face, score_windows
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.training import read_experiment

WINDOWS, N_CONTEXT, N_SUFFIX, VOCAB = 7, 21, 6, 37
PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "global_impact": {"criterion": "global_impact", "schedule": "linear", "mean_keep": 0.6},
    "random": {"criterion": "random", "schedule": "uniform", "mean_keep": 0.5, "protect_recent": 0.3},
}


@pytest.fixture(scope="module")
def dense() -> LanguageModel:
    model = LanguageModel(ModelConfig(d_model=12, n_layer=3, vocab_size=VOCAB, d_state=3), seed=2).eval()
    # At initialisation logits are almost flat; a larger embedding makes the model prefer some tokens over others.
    model.backbone.embedding.weight.data.mul_(20)
    return model


@pytest.fixture(scope="module")
def windows() -> EvalWindows:
    shape = (WINDOWS, N_CONTEXT + N_SUFFIX)
    tokens = np.random.default_rng(4).integers(0, VOCAB, shape)
    document = np.array([0, 0, 1, 2, 2, 2, 3])
    last = find_last_occurrence(tokens, N_CONTEXT)
    return EvalWindows(torch.from_numpy(tokens), document, N_CONTEXT, np.ones(WINDOWS, np.int64), last)


def arm(dense: LanguageModel, name: str) -> LanguageModel:
    return dense.sparsified(**PLANS[name]) if PLANS[name] else dense


@torch.no_grad()
def token_by_token(model: LanguageModel, windows: EvalWindows, reach: int) -> np.ndarray:
    """NLL of each suffix token from a forward pass of its own over what precedes it, one window at a time."""
    table = np.zeros((len(windows), windows.n_suffix))
    for row, window in enumerate(windows.tokens):
        seen = window[windows.n_context - reach :]
        for place in range(windows.n_suffix):
            logits = model(seen[None, : reach + place], n_context=reach).logits[0, -1].double()
            table[row, place] = math.log(float(logits.exp().sum())) - float(logits[seen[reach + place]])
    return table


@pytest.mark.parametrize("reach", [N_CONTEXT, 8, 1])
@pytest.mark.parametrize("name", list(PLANS))
def test_scores_equal_a_loop_over_single_tokens(
    dense: LanguageModel, windows: EvalWindows, name: str, reach: int
) -> None:
    model = arm(dense, name)
    scores = score_windows(model, windows, 3, n_context=reach)
    expected = token_by_token(model, windows, reach)
    assert scores.nll.shape == (WINDOWS, N_SUFFIX) and expected.std() > 0.3
    np.testing.assert_allclose(scores.nll, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", list(PLANS))
def test_the_batch_size_changes_nothing(dense: LanguageModel, windows: EvalWindows, name: str) -> None:
    model = arm(dense, name)
    alone = score_windows(model, windows, 1)
    for batch_size in (2, 5, 100):
        together = score_windows(model, windows, batch_size)
        np.testing.assert_allclose(together.nll, alone.nll, rtol=0, atol=1e-5)
        assert together.flops_by_op == alone.flops_by_op


@pytest.mark.parametrize("reach", [N_CONTEXT, 8])
@pytest.mark.parametrize("name", list(PLANS))
def test_realised_flops_are_the_closed_form(dense: LanguageModel, windows: EvalWindows, name: str, reach: int) -> None:
    model = arm(dense, name)
    scores = score_windows(model, windows, 3, n_context=reach)
    closed = model.flops(reach, N_SUFFIX)
    assert scores.flops_by_op == closed.by_op() and scores.flops == closed.total
    assert ("select" in scores.flops_by_op) == (name != "dense")
    assert scores.seconds > 0


def test_progress_counts_windows(dense: LanguageModel, windows: EvalWindows) -> None:
    done: list[int] = []
    score_windows(dense, windows, 3, progress=done.append)
    assert done == [3, 6, 7]


@pytest.mark.parametrize("reach", [0, N_CONTEXT + 1])
def test_a_context_out_of_reach_is_refused(dense: LanguageModel, windows: EvalWindows, reach: int) -> None:
    with pytest.raises(InputError, match=rf"n_context must lie in 1..{N_CONTEXT}.* got {reach}"):
        score_windows(dense, windows, 3, n_context=reach)


def test_a_likelihood_that_is_not_finite_is_refused(windows: EvalWindows) -> None:
    model = LanguageModel(ModelConfig(d_model=12, n_layer=2, vocab_size=VOCAB, d_state=3), seed=2).eval()
    model.backbone.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="not finite in windows 0 to 1"):
        score_windows(model, windows, 2)


def counted_by_hand(tokens: np.ndarray, row: int, place: int) -> int | None:
    """Positions back to the last occurrence of the token that stands at ``place`` of the suffix."""
    target = N_CONTEXT + place
    for back in range(1, target + 1):
        if tokens[row, target - back] == tokens[row, target]:
            return back
    return None


@pytest.mark.parametrize("reach", range(1, N_CONTEXT - 1))
def test_the_far_face_is_counted_by_hand(windows: EvalWindows, reach: int) -> None:
    nll = np.random.default_rng(5).random((WINDOWS, N_SUFFIX), np.float32)
    far = far_face(nll, windows, reach)
    tokens, total, count = windows.tokens.numpy(), np.zeros(WINDOWS), np.zeros(WINDOWS)
    for row in range(WINDOWS):
        for place in range(N_SUFFIX):
            back = counted_by_hand(tokens, row, place)
            if back is not None and back > place + reach:
                total[row] += nll[row, place]
                count[row] += 1
    assert 0 < count.sum() < nll.size
    np.testing.assert_array_equal(far.tokens, count)
    np.testing.assert_allclose(far.nll, total, rtol=1e-6)
    assert far.mean == pytest.approx(total.sum() / count.sum())


def test_the_plain_face_is_the_mean_of_all_tokens(windows: EvalWindows) -> None:
    nll = np.random.default_rng(5).random((WINDOWS, N_SUFFIX), np.float32)
    plain = plain_face(nll, windows)
    assert plain.mean == pytest.approx(float(nll.mean()), rel=1e-6) and plain.tokens.tolist() == [N_SUFFIX] * WINDOWS
    assert far_face(nll, windows, N_CONTEXT).mean is None
    assert Face(np.zeros(2), np.zeros(2)).mean is None


def test_distances_share_out_all_tokens(windows: EvalWindows) -> None:
    nll = np.random.default_rng(6).random((WINDOWS, N_SUFFIX), np.float32)
    edges = distance_edges(9, N_CONTEXT)
    table = by_distance(nll, windows, edges)
    assert [(row["low"], row["high"]) for row in table] == [(1, 4), (4, 9), (9, 15), (15, None), (None, None)]
    assert sum(row["tokens"] for row in table) == nll.size
    weighted = sum(row["tokens"] * row["nll"] for row in table if row["tokens"])
    assert weighted / nll.size == pytest.approx(float(nll.mean()), rel=1e-6)
    distances = [counted_by_hand(windows.tokens.numpy(), row, i) for row in range(WINDOWS) for i in range(N_SUFFIX)]
    for row in table[:-1]:
        inside = [d for d in distances if d is not None and row["low"] <= d < (row["high"] or math.inf)]
        assert row["tokens"] == len(inside)
    assert table[-1]["tokens"] == distances.count(None)


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_edges_always_ascend_and_reach_ends_one(reach: int, more: int) -> None:
    edges = distance_edges(reach, reach + more)
    assert all(low < high for low, high in zip([1, *edges], edges, strict=False))
    assert reach in edges or reach == 1


def test_arms_are_named_as_in_tables(dense: LanguageModel) -> None:
    pruned = parse_arm("geometric:norm@0.5", dense)
    assert pruned.pruning.name == "geometric:norm" and np.mean(pruned.keep_counts(1000)) == pytest.approx(500, abs=1)
    assert parse_arm("dense", pruned).pruning is None
    for text in ("linear", "linear:norm", "linear@0.5", ":norm@0.5", "linear:norm@half"):
        with pytest.raises(InputError, match="should be dense or schedule:criterion@mean_keep"):
            parse_arm(text, dense)


def test_every_arm_is_parsed_before_any_is_measured(dense: LanguageModel, windows: EvalWindows) -> None:
    said: list[str] = []
    with pytest.raises(InputError, match="'norn' is unknown"):
        evaluate_arms(dense, ["dense", "linear:norn@0.6"], windows, 3, 8, said.append)
    assert said == []


def test_eval_prints_and_writes_what_scoring_gives(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.lab(tmp_path_factory.getbasetemp()).run
    names = ["dense", "linear:recency@0.6"]
    sizes = {"--windows": 10, "--n-context": 60, "--n-suffix": 9, "--batch-size": 4, "--reach": 20}
    given = [str(part) for pair in sizes.items() for part in pair]
    assert tiny.simba_lab("eval", "--checkpoint", run, "--arms", *names, *given, "--json", tmp_path / "e.json") == 0
    result, printed = json.loads((tmp_path / "e.json").read_text()), capsys.readouterr().out
    windows = read_experiment(run / "config.yaml").data.eval_windows("test", 60, 9, 10)
    model = simba_lab.load(run)
    assert (result["windows"], result["split"], result["reach"]) == (10, "test", 20)
    for row, made in zip(result["arms"], (model, model.sparsified("recency", "linear", mean_keep=0.6)), strict=True):
        nll = score_windows(made, windows, 4).nll
        assert row["quality"] == pytest.approx(float(nll.mean()), abs=1e-6)
        assert row["quality_far"] == pytest.approx(far_face(nll, windows, 20).mean, abs=1e-6)
        assert row["quality_interval"][0] < row["quality"] < row["quality_interval"][1]
        assert row["flops"] == made.flops(60, 9).total and row["keep_counts"] == made.keep_counts(60)
        assert f"{row['name']}: {row['quality']:.4f} nats/token" in printed and f"{row['flops'] / 1e9:.3f}" in printed
    assert [row["name"] for row in result["arms"]] == names
    assert "10 test windows" in printed and "FLOPs = 2 x multiply-adds" in result["convention"]


@pytest.mark.parametrize("format", ["run", "state-spaces", "transformers"])
def test_eval_of_a_converted_model_on_a_named_text(
    format: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With its own tokenizer it reads what its run reads, and says the same."""
    run = tiny.lab(tmp_path_factory.getbasetemp()).run
    assert tiny.simba_lab("convert", run, tmp_path / "model", "--format", format) == 0
    shutil.copy(run / "tokenizer.json", tmp_path / "model" / "tokenizer.json")
    data = read_experiment(run / "config.yaml").data.settings
    sizes = ("--windows", 5, "--n-context", 60, "--n-suffix", 9, "--arms", "dense", "linear:recency@0.6")
    rows = []
    for checkpoint, source in ((run, ()), (tmp_path / "model", ("--source", data.source))):
        given = ("eval", "--checkpoint", checkpoint, *source, *sizes, "--json", tmp_path / "e.json")
        assert tiny.simba_lab(*map(str, given)) == 0
        rows.append([arm["quality"] for arm in json.loads((tmp_path / "e.json").read_text())["arms"]])
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
