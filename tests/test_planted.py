"""Windows with something to recall and sweeps over them; arms with their own weights, budgets between two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from simba_lab.data import EvalWindows, TextData, Tokenizer, is_far
from simba_lab.data.recall_windows import CUE, PASSAGE, plant
from simba_lab.errors import InputError
from simba_lab.evaluate.windows import answered, by_distance, far_face, plain_face
from simba_lab.sweep import run_sweep
from simba_lab.sweep.plan import make_plan
from simba_lab.training import read_experiment

N_CONTEXT, N_SUFFIX = 400, 50


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def data(lab: tiny.Lab) -> TextData:
    return TextData(source=str(lab.text), vocab_size=300, cache_dir=str(lab.cache))


@pytest.fixture(scope="module")
def plain(data: TextData) -> EvalWindows:
    return data.eval_windows("test", N_CONTEXT, N_SUFFIX, 10)


def parts(windows: EvalWindows, row: int, tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Text of the context, of what counts in the suffix, and of the suffix after it."""
    tokens, counted = windows.tokens[row].tolist(), int(windows.scored[row].sum())
    cut = windows.n_context
    return tuple(
        tokenizer.decode(part) for part in (tokens[:cut], tokens[cut : cut + counted], tokens[cut + counted :])
    )


@pytest.mark.parametrize(("form", "facts"), [("sentence", 1), ("sentence", 3), ("pair", 4)])
def test_the_answer_stands_once_the_asked_distance_before_the_question(
    plain: EvalWindows, data: TextData, form: str, facts: int
) -> None:
    distance, tokenizer = 150, data.tokenizer
    windows = plant(plain, tokenizer, distance, form, facts, seed=3)
    assert windows.tokens.shape == plain.tokens.shape and windows.n_context == N_CONTEXT
    np.testing.assert_array_equal(windows.document, plain.document)
    for row in range(len(windows)):
        context, answer, rest = parts(windows, row, tokenizer)
        body, question = context.rsplit("\n\n", 1)
        statement = question + answer + (rest[0])
        assert question.startswith("The secret of" if form == "sentence" else "[ ") and statement in body
        between = body.split(statement, 1)[1].split("\n\n", 1)[1]
        assert abs(len(tokenizer.encode(between)) - distance) <= 2, "cut tokens may encode a little otherwise"
        assert body.count("The secret of" if form == "sentence" else " = ") >= facts
        length = int(windows.scored[row].sum())
        assert windows.scored[row, :length].all() and not windows.scored[row, length:].any()
        after = windows.tokens[row, N_CONTEXT + length + 1 :]
        assert torch.equal(after, plain.tokens[row, N_CONTEXT : N_CONTEXT + len(after)])


def test_a_passage_comes_back(plain: EvalWindows, data: TextData) -> None:
    windows, distance = plant(plain, data.tokenizer, 100, "passage"), 100
    for tokens, before in zip(windows.tokens, plain.tokens, strict=True):
        passage = tokens[N_CONTEXT - CUE - distance - PASSAGE : N_CONTEXT - CUE - distance]
        shown = tokens[N_CONTEXT - CUE :][: min(PASSAGE, CUE + N_SUFFIX)]
        assert torch.equal(shown, passage[: len(shown)])
        assert torch.equal(tokens[: N_CONTEXT - CUE], before[CUE:N_CONTEXT])


def test_the_seed_and_the_document_decide_the_facts(plain: EvalWindows, data: TextData) -> None:
    first, again, other = (plant(plain, data.tokenizer, 50, seed=seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"distance": 390}, "recall.distance: 390 tokens"),
        ({"distance": 0, "facts": 54}, r"recall.distance: 0 tokens, \d+ planted .* lower it or recall.facts, or raise"),
        ({"distance": -1}, "recall.distance: -1 must be at least 0"),
        ({"distance": 10, "form": "riddle"}, "recall.form: no 'riddle'"),
        ({"distance": 10, "facts": 0}, "recall.facts: 0 of the form 'sentence' must lie in 1..54"),
        ({"distance": 10, "facts": 82, "form": "pair"}, "recall.facts: 82 of the form 'pair' must lie in 1..81"),
        ({"distance": 10, "form": "passage", "facts": 2}, "recall.facts: 2 of the form 'passage' must lie in 1..1"),
        ({"distance": 10, "seed": -1}, "recall.seed: -1 must be at least 0"),
        ({"distance": 350, "form": "passage"}, "do not fit into 400 tokens"),
    ],
)
def test_what_cannot_be_planted_is_refused(
    plain: EvalWindows, data: TextData, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plant(plain, data.tokenizer, **how)


def test_only_the_answer_counts(plain: EvalWindows, data: TextData) -> None:
    windows = plant(plain, data.tokenizer, 150, "pair", 4)
    nll = np.random.default_rng(0).random((len(windows), N_SUFFIX), np.float32)
    face, far, scored = plain_face(nll, windows), far_face(nll, windows, 60), windows.scored
    assert face.tokens.tolist() == scored.sum(1).tolist() and face.mean == pytest.approx(nll[scored].mean(), rel=1e-6)
    beyond = scored & is_far(windows.last_occurrence, N_CONTEXT, 60)
    assert far.tokens.sum() == beyond.sum()
    sums = [nll[row][scored[row]].sum() for row in range(len(windows))]
    assert answered(nll, windows) == np.mean([total < np.log(2) for total in sums])
    assert sum(group["tokens"] for group in by_distance(nll, windows, [8, 64])) == scored.sum()


def test_a_sweep_scores_what_was_planted_and_says_so(lab: tiny.Lab, tmp_path: Path) -> None:
    changes = {"recall": {"form": "sentence", "distance": 10}, "windows": 4, "n_context": 96}
    results = json.loads(run_sweep("planted", lab.sweep_config(tmp_path / "planted.yaml", changes)).read_text())
    plain = json.loads(run_sweep("plain", lab.sweep_config(tmp_path / "plain.yaml", {"windows": 4})).read_text())
    assert "answers to planted facts (sentence), 10 tokens back" in results["metric"]
    for arm, other in zip(results["arms"], plain["arms"], strict=True):
        assert 0 <= arm["answered"] <= 1 and "answered" not in other
        assert arm["quality"] != other["quality"] and arm["flops"] == other["flops"]


def test_an_arm_may_bring_its_own_weights(lab: tiny.Lab, tmp_path: Path) -> None:
    small = "small.yaml"
    arms = [
        {"kind": "smaller_dense", "name": "small", "experiment": small},
        {"kind": "dense"},
        {"kind": "dense", "experiment": small},
        {"kind": "shorter_context", "experiment": small},
        {"schedule": "uniform", "criterion": "norm", "experiment": small},
    ]
    config = lab.sweep_config(tmp_path / "own.yaml", {"arms": arms, "windows": 4})
    results = {arm["name"]: arm for arm in json.loads(run_sweep("own", config).read_text())["arms"]}
    assert list(results) == ["small", "dense", "dense of small", "shorter_context of small", "uniform:norm of small"]
    assert results["dense of small"]["quality"] == results["small"]["quality"] != results["dense"]["quality"]
    assert results["dense of small"]["flops"] == results["small"]["flops"]


def test_weights_with_another_tokenizer_are_refused(lab: tiny.Lab, tmp_path: Path) -> None:
    other = lab.experiment(tmp_path / "other.yaml", {"model.model.d_model": 18})
    shutil.copytree(lab.folder / "runs" / "small", tmp_path / "runs" / "other")
    config = tmp_path / "runs" / "other" / "config.yaml"
    config.write_text(config.read_text().replace(str(lab.folder / "runs" / "small"), str(tmp_path / "runs" / "other")))
    tokenizer = tmp_path / "runs" / "other" / "tokenizer.json"
    written = json.loads(tokenizer.read_text())
    arms = [{"kind": "smaller_dense", "name": "small", "experiment": str(other)}, {"kind": "dense"}]
    tokenizer.write_text(json.dumps(written, indent=4))
    run_sweep("written_otherwise", lab.sweep_config(tmp_path / "alike.yaml", {"arms": arms, "windows": 4}))
    written["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"other\.yaml was trained with another tokenizer than .*base\.yaml"):
        run_sweep("other", lab.sweep_config(tmp_path / "tokens.yaml", {"arms": arms, "windows": 4}))


def test_a_budget_may_be_a_share_of_an_arms_cost(lab: tiny.Lab, tmp_path: Path) -> None:
    arms = [{"kind": "shorter_context"}, {"kind": "dense"}, {"schedule": "uniform", "criterion": "recency"}]
    whole = {"arms": arms, "budget": {"reference": "dense", "share": 0.6, "tolerance": 0.02}}
    config = lab.sweep_config(tmp_path / "share.yaml", whole)
    plan = make_plan(config, read_experiment(Path(config.experiment)), {})
    dense = plan.arms[1].arm.flops
    assert plan.budget.flops == round(0.6 * dense) and "60 % of the arm dense" in str(plan.budget)
    assert all(abs(arm.arm.flops / plan.budget.flops - 1) <= 0.02 for arm in plan.arms if arm.matched)
    for budget in (
        {"reference": "dense", "share": 0.0},
        {"reference": "dense", "share": 1.2},
        {"flops": 9, "share": 0.5},
    ):
        with pytest.raises(InputError, match=r"budget\.share"):
            lab.sweep_config(tmp_path / "share.yaml", {"arms": arms, "budget": budget})
