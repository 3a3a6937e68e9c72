"""The ledger of what ran against the closed form of what should run, and both against the design page's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from slow_oracle import random_tokens, tiny_model

from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger, charge, is_recording, recording, select
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, Criterion, Signals

LINEAR = {"schedule": "linear", "final_keep": 0.1}


class Energy(Criterion):
    """A user's criterion, whose cost is measured: a product and a sum."""

    def score(self, signals: Signals) -> torch.Tensor:
        return (signals.x * signals.x).sum(-1)


ARMS = {
    "dense": None,
    **{name: {"criterion": name, **LINEAR} for name in CRITERIA.names()},
    "gated": {"criterion": {"class_path": "global_impact", "init_args": {"reduce": "l2", "gated": True}}, **LINEAR},
    "user": {"criterion": f"{__name__}.Energy", **LINEAR},
    "uniform": {"criterion": "norm", "schedule": "uniform", "keep": 0.4},
    "highway": {"criterion": "norm", "schedule": "highway_top", "keep": 0.3},
    "protected": {"criterion": "random", "schedule": "geometric", "final_keep": 0.1, "protect_recent": 0.5},
    "rounded": {"criterion": "norm", "schedule": "linear", "final_keep": 0.1, "multiple_of": 8},
}
every_arm = pytest.mark.parametrize("arm", list(ARMS))


def build(arm: str, **shape: object) -> LanguageModel:
    lm = tiny_model(dtype=torch.float32, **shape)
    return lm if ARMS[arm] is None else lm.sparsified(**ARMS[arm])


def nonzero(entries: dict) -> dict:
    return {key: flops for key, flops in entries.items() if flops}


@every_arm
@pytest.mark.parametrize(
    ("n_context", "n_suffix", "head"), [(21, 4, "scored"), (16, 0, "scored"), (9, 2, "all"), (1, 1, "scored")]
)
def test_what_runs_forward_is_the_closed_form(arm: str, n_context: int, n_suffix: int, head: str) -> None:
    lm, batch = build(arm), 3
    with torch.no_grad(), recording(Ledger()) as ledger:
        lm(random_tokens(batch, n_context + n_suffix), n_context=n_context, head=head)
    closed = lm.flops(n_context, n_suffix, head)
    expected = {("forward", layer, op): batch * flops for (layer, op), flops in closed.entries.items()}
    assert nonzero(ledger.entries) == nonzero(expected)
    assert ledger.total == batch * closed.total
    assert nonzero(ledger.by_op()) == {op: batch * flops for op, flops in nonzero(closed.by_op()).items()}


@every_arm
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_what_runs_in_training_is_the_closed_form_of_training(arm: str, backend: str) -> None:
    lm, batch = build(arm, backend=backend), 2
    with recording(Ledger()) as ledger:
        out = lm(random_tokens(batch, 25), n_context=21)
    out.logits.square().sum().backward()  # outside: what was recorded stays bound to its ledger
    training = lm.flops(21, 4).training()
    totals: dict[tuple[int, str], int] = {}
    for (_, layer, op), flops in ledger.entries.items():
        totals[layer, op] = totals.get((layer, op), 0) + flops
    assert nonzero(totals) == nonzero({key: batch * flops for key, flops in training.entries.items()})
    assert not [key for key in ledger.entries if key[0] == "backward" and key[2] in ("score", "select")]


def test_two_steps_cost_twice_as_much_as_one() -> None:
    lm, ledger = build("global_impact"), Ledger()
    totals = []
    for _ in range(2):
        with recording(ledger):
            lm(random_tokens(2, 20), n_context=16).logits.sum().backward()
        totals.append(ledger.total)
    assert totals[1] == 2 * totals[0] == 4 * lm.flops(16, 4).training().total


def test_decoding_costs_what_a_suffix_costs() -> None:
    sparse, tokens = build("global_impact"), random_tokens(2, 20)
    with torch.no_grad(), recording(Ledger()) as ledger:
        states = sparse.prefill(tokens[:, :16]).states
        for place in range(16, 20):
            _, states = sparse.extend(tokens[:, place : place + 1], states)
    assert ledger.total == 2 * sparse.flops(16, 4).total


def test_backward_passes_that_do_not_run_are_not_charged() -> None:
    lm = build("dense")
    with recording(Ledger()) as ledger:
        lm(random_tokens(2, 9))
    assert {phase for phase, _, _ in ledger.entries} == {"forward"}
    frozen = build("dense", tie_embeddings=False)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(not name.startswith(("backbone.embedding", "backbone.layers.0", "backbone.layers.1")))
    with recording(Ledger()) as ledger:
        frozen(random_tokens(2, 9)).logits.sum().backward()
    assert {layer for phase, layer, _ in ledger.entries if phase == "backward"} == {2, 3, -1}


def test_nothing_is_charged_outside_and_ledgers_nest() -> None:
    outer, inner = Ledger(), Ledger()
    assert not is_recording()
    charge(0, "lost", 7)
    with recording(outer):
        charge(0, "a", 1)
        with recording(inner):
            charge(0, "b", 2)
        charge(0, "a", 4)
        assert is_recording()
    assert not is_recording()
    assert (outer.by_op(), inner.by_op()) == ({"a": 5}, {"b": 2})
    with pytest.raises(RuntimeError), recording(outer):
        raise RuntimeError
    assert not is_recording()


def test_the_closed_form_is_the_design_pages() -> None:
    """Section 6, per token: 4 d d_in, 2 w d_in, 2 d_in (R + 2N), 2 R d_in, 9 d_in N, 2 d_in d; head 2 d V."""
    lm = build("global_impact", d_model=40, n_layer=3, d_state=5, d_conv=3, expand=3, vocab_size=50)
    d, inner, rank, states, width = 40, 120, 3, 5, 3
    per_token = {
        "in_proj": 4 * d * inner, "causal_conv": 2 * width * inner, "x_proj": 2 * inner * (rank + 2 * states),
        "dt_proj": 2 * rank * inner, "selective_scan": 9 * inner * states, "out_proj": 2 * inner * d,
    }  # fmt: skip
    counts = lm.keep_counts(100)
    assert counts == [100, 55, 10]
    table = lm.flops(100, 7)
    for layer, count in enumerate(counts):
        for op, flops in per_token.items():
            assert table.entries[layer, op] == (count + 7) * flops
    for layer in (0, 1):
        assert table.entries[layer, "score"] == counts[layer] * (4 * inner * states + states + 4 * inner)
        assert table.entries[layer, "select"] == counts[layer] * math.ceil(math.log2(counts[layer]))
    assert (2, "score") not in table.entries
    assert table.entries[-1, "head"] == 2 * 8 * d * 56
    assert lm.flops(100, 7, "all").entries[-1, "head"] == 2 * 17 * d * 56
    assert sum(table.by_op().values()) == sum(table.by_layer().values()) == table.total
    training = table.training()
    assert training.total == 3 * table.total - 2 * (table.by_op()["score"] + table.by_op()["select"])


def test_scoring_is_charged_only_where_something_is_dropped() -> None:
    entries = build("highway").flops(20, 2).entries
    assert [layer for layer, op in entries if op == "score"] == [1]
    assert not [op for _, op in build("dense").flops(20, 2).entries if op in ("score", "select")]


@pytest.mark.parametrize(("tokens", "comparisons"), [(1, 0), (2, 2), (3, 6), (1024, 10_240), (1025, 11_275)])
def test_selection_counts_comparisons(tokens: int, comparisons: int) -> None:
    assert select(tokens) == comparisons


def test_an_unknown_head_accounting_is_named() -> None:
    with pytest.raises(InputError, match="head must be scored or all, got 'last'"):
        build("dense").flops(5, 1, head="last")
