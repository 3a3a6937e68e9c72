"""Criteria: one contract over the registry and over a user's own, then what each of them measures."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slow_oracle import impact_by_removal, random_tokens, silu, softplus, tiny_model
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import resolve
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.pruning import CRITERIA, Criterion, ScoredShape, Signals
from simba_lab.pruning.hashing import sequence_key
from simba_lab.pruning.signals import LookAhead

OPTIONS = {
    "global_impact": [{}, {"reduce": "absmax", "gated": True}, {"reduce": "l2"}],
    "local_delta": [{}],
    "norm": [{}],
    "random": [{}, {"seed": 5}],
    "recency": [{}],
    "query_impact": [{}, {"queries": 5, "probes": 2, "reduce": "l2"}],
    "output_impact": [{}, {"reduce": "max", "gated": True}],
    "banded_impact": [{}, {"first": 3, "falloff": 0}],
    "blocks": [{"size": 4}, {"criterion": "random", "size": 3, "pool": "max"}],
    "lookahead_impact": [
        {},
        {"layer": 4, "before": 2, "after": 1, "reduce": "max"},
        {"layer": 1},
        {"layer": 4, "skip_protected": True},
        {"layer": 1, "after": 1, "skip_protected": True},
    ],
}
BEYOND_TOKENS = ("query_impact", "output_impact", "banded_impact", "blocks", "lookahead_impact")
"""Criteria that cost more, or less, than so much per token; test_own_criteria.py and test_lookahead.py say what."""
SPECS = [{"class_path": name, "init_args": options} for name, variants in OPTIONS.items() for options in variants]
every_criterion = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec['class_path']}-{spec['init_args']}")
PER_SEQUENCE = ("x", "dt", "B", "C", "z", "hidden", "positions", "sequence_key")


def signals(
    batch: int = 3, tokens: int = 11, channels: int = 7, states: int = 4, dtype: torch.dtype = torch.float64,
    backend: str = "auto",
) -> Signals:  # fmt: skip
    """Random signals of a layer that every second token of a longer context has reached."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    given = Signals(
        layer=2, backend=resolve(backend, "cpu"), x=draw(batch, tokens, channels), dt=draw(batch, tokens, channels),
        dt_bias=draw(channels), A=-torch.exp(draw(channels, states)).to(wide),
        B=draw(batch, tokens, states), C=draw(batch, tokens, states), z=draw(batch, tokens, channels),
        hidden=draw(batch, tokens, 5), positions=(2 * torch.arange(tokens) + 1).expand(batch, tokens),
        sequence_key=sequence_key(random_tokens(batch, 30)), channel_norms=draw(channels).abs().to(wide),
    )  # fmt: skip
    weights = {"x": draw(5, channels), "dt": draw(5, channels), "B": draw(5, states), "C": draw(5, states)}

    def ahead(layer: int, stream: Tensor, present: slice = slice(None)) -> Signals:
        later = {name: (stream[..., None] * weight).sum(-2) for name, weight in weights.items()}
        return dataclasses.replace(given, layer=layer, hidden=stream, positions=given.positions[:, present], **later)

    return dataclasses.replace(given, ahead=LookAhead(ahead, 8, flops=1, reach=4), n_free=max(1, tokens - 3))


def rows(given: Signals, order: list[int]) -> Signals:
    return dataclasses.replace(given, **{name: getattr(given, name)[order] for name in PER_SEQUENCE})


def test_every_registered_criterion_is_under_contract() -> None:
    assert sorted(OPTIONS) == CRITERIA.names()


@every_criterion
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_scores_are_one_finite_wide_number_per_token(spec: dict, dtype: torch.dtype, tokens: int) -> None:
    criterion, given = CRITERIA.build(spec), signals(tokens=tokens, dtype=dtype)
    scores = criterion.score(given)
    assert scores.shape == (3, tokens) and scores.isfinite().all()
    assert scores.dtype in (torch.float32, torch.float64)  # never half: ties would decide
    assert torch.equal(scores, criterion.score(given))


@every_criterion
def test_a_sequence_is_scored_alone_as_in_any_batch(spec: dict) -> None:
    criterion, given = CRITERIA.build(spec), signals(batch=4)
    scores = criterion.score(given)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 1, 3]):
        torch.testing.assert_close(criterion.score(rows(given, order)), scores[order], rtol=1e-13, atol=0)


@every_criterion
def test_backends_agree(spec: dict) -> None:
    criterion = CRITERIA.build(spec)
    fast, slow = (criterion.score(signals(backend=name)) for name in ("numba", "reference"))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)


@every_criterion
def test_the_cost_is_declared_grows_with_the_tokens_and_is_free_only_without_an_op(spec: dict) -> None:
    criterion = CRITERIA.build(spec)
    costs = [criterion.flops(ScoredShape(tokens, 5, 10, 4)) for tokens in (1, 10, 100)]
    assert all(type(cost) is int for cost in costs)
    if spec["class_path"] in ("random", "recency"):
        assert costs == [0, 0, 0] and criterion.op == "none"
    elif spec["class_path"] in BEYOND_TOKENS:
        assert 0 < costs[0] < costs[1] < costs[2] and criterion.op is None
    else:
        assert costs[0] > 0 and costs == [costs[0], 10 * costs[0], 100 * costs[0]] and criterion.op


@every_criterion
def test_a_spec_round_trip_scores_the_same(spec: dict) -> None:
    criterion = CRITERIA.build(spec)
    plain = CRITERIA.spec(criterion)
    assert plain["class_path"] == spec["class_path"] and spec["init_args"].items() <= plain["init_args"].items()
    assert torch.equal(CRITERIA.build(plain).score(signals()), criterion.score(signals()))


# What each measures


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_global_impact_is_what_the_boundary_loses_without_the_token(backend: str) -> None:
    given = signals(batch=2, tokens=23, channels=37, backend=backend)
    delta = softplus(given.dt + given.dt_bias)
    gate = silu(given.z[:, -1])
    for i in range(2):
        lost = impact_by_removal(given.x[i], delta[i], given.A, given.B[i], given.C[i, -1])
        for options, expected in (
            ({}, lost.amax(-1)),
            ({"reduce": "absmax"}, lost.abs().amax(-1)),
            ({"reduce": "l2"}, lost.square().sum(-1).sqrt()),
            ({"gated": True}, (lost * gate[i]).amax(-1)),
            ({"gated": True, "reduce": "l2"}, (lost * gate[i]).square().sum(-1).sqrt()),
        ):
            scores = CRITERIA.build({"class_path": "global_impact", "init_args": options}).score(given)
            torch.testing.assert_close(scores[i], expected, rtol=1e-11, atol=1e-12)


def test_local_delta_norm_and_recency_are_what_they_say() -> None:
    given = signals()
    delta = softplus(given.dt + given.dt_bias)
    torch.testing.assert_close(CRITERIA.build("local_delta").score(given), delta.square().sum(-1).sqrt())
    torch.testing.assert_close(CRITERIA.build("norm").score(given), given.hidden.square().sum(-1).sqrt())
    assert torch.equal(CRITERIA.build("recency").score(given), given.positions.float())
    torch.testing.assert_close(given.delta, delta)
    assert signals(dtype=torch.bfloat16).delta.dtype == torch.float32


def test_half_precision_signals_are_measured_in_single() -> None:
    given = signals(dtype=torch.bfloat16)
    wide = dataclasses.replace(
        given, **{name: getattr(given, name).float() for name in ("x", "dt", "dt_bias", "B", "C", "z", "hidden")}
    )
    for name in ("global_impact", "local_delta", "norm"):
        criterion = CRITERIA.build(name)
        torch.testing.assert_close(criterion.score(given), criterion.score(wide), rtol=1e-6, atol=1e-7)


def test_random_is_uniform_and_keyed_by_seed_layer_sequence_and_position() -> None:
    given = signals(batch=8, tokens=4000, channels=1, states=1)
    given = dataclasses.replace(given, sequence_key=sequence_key(random_tokens(8, 30)))
    scores = CRITERIA.build("random").score(given)
    assert scores.min() >= 0 and scores.max() < 1
    counts = torch.histc(scores, bins=16, min=0, max=1)
    expected = scores.numel() / 16
    assert ((counts - expected).square() / expected).sum() < 37.7  # chi-squared with 15 degrees of freedom, p = 0.001
    others = [
        CRITERIA.build({"class_path": "random", "init_args": {"seed": 1}}).score(given),
        CRITERIA.build("random").score(dataclasses.replace(given, layer=3)),
        scores.roll(1, dims=0),
        scores.roll(1, dims=1),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.025  # 4.5 standard deviations of 32,000 pairs


def test_random_does_not_depend_on_which_other_tokens_are_left() -> None:
    given = signals(tokens=12)
    left = [1, 4, 5, 11]
    fewer = dataclasses.replace(given, positions=given.positions[:, left])
    random = CRITERIA.build("random")
    assert torch.equal(random.score(fewer), random.score(given)[:, left])


def test_random_is_pinned() -> None:
    """The numbers themselves, computed once with Python's integers: another release must prune the same tokens."""
    given = dataclasses.replace(signals(batch=1, tokens=3), sequence_key=sequence_key(torch.tensor([[1, 2, 3]])))
    bits = (CRITERIA.build("random").score(given) * 2**24).to(torch.int64).tolist()
    assert bits == [[12447975, 3340215, 13101303]]


def test_a_sequence_key_depends_on_every_token_and_its_place() -> None:
    tokens = random_tokens(1, 9)
    variants = [tokens, tokens.flip(1), tokens[:, :-1], torch.cat([tokens, torch.zeros(1, 1, dtype=torch.int64)], 1)]
    for place in range(9):
        changed = tokens.clone()
        changed[0, place] += 1
        variants.append(changed)
    keys = [int(sequence_key(variant)) for variant in variants]
    assert len(set(keys)) == len(keys)
    both = torch.cat([tokens, tokens.flip(1)])
    assert sequence_key(both).tolist() == keys[:2]


def test_a_wrong_reduction_is_named() -> None:
    with pytest.raises(InputError, match="global_impact: reduce must be max, absmax or l2, got 'mean'"):
        CRITERIA.build({"class_path": "global_impact", "init_args": {"reduce": "mean"}})


# A user's own

USER_SOURCE = """
import torch
from simba_lab.pruning import Criterion


class Loudest(Criterion):
    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def score(self, signals):
        return signals.x.abs().pow(self.power).sum(-1)


class Product(Criterion):
    def score(self, signals):
        return (signals.x @ signals.A).sum(-1)


class Wrapped(Criterion):
    def score(self, signals):
        gate = torch.ones_like(signals.z[:, -1])
        return signals.backend.global_impact(
            signals.x, signals.dt, signals.dt_bias, signals.A, signals.B, signals.C[:, -1], gate, "l2"
        )


class PerChannel(Criterion):
    def score(self, signals):
        return signals.x


class Transposed(Criterion):
    def score(self, signals):
        return signals.x.sum(-1).T


class NoTensor(Criterion):
    def score(self, signals):
        return 3.0


class Peeking(Criterion):
    def score(self, signals):
        return signals.x.sum(-1) * (2.0 if signals.x.max().item() > 0 else 1.0)


class Counting(Criterion):
    def score(self, signals):
        return signals.x.sum(-1) * len(signals.x.nonzero())


class Listing(Criterion):
    def score(self, signals):
        return torch.tensor([[sum(t) for t in row] for row in signals.x.tolist()])


class ThroughNumpy(Criterion):
    def score(self, signals):
        return torch.from_numpy(signals.x.numpy()).sum(-1)
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_criteria.py").write_text(USER_SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_criteria", None)


SHAPE = ScoredShape(n_tokens=11, d_model=5, d_inner=7, d_state=4)


def test_a_users_criterion_prunes_and_is_charged_for_what_it_computes(user_file: None) -> None:
    lm, tokens = tiny_model(), random_tokens(2, 20)
    spec = {"class_path": "my_criteria.Loudest", "init_args": {"power": 3.0}}
    sparse = lm.sparsified(criterion=spec, schedule="linear", final_keep=0.2)
    assert [kept.shape[1] for kept in sparse(tokens, n_context=16).kept] == sparse.keep_counts(16)
    assert CRITERIA.spec(sparse.pruning.criterion) == spec
    assert sparse.pruning.name == "linear:Loudest"
    # abs, pow, sum: one FLOP per element each
    assert sparse.pruning.criterion.flops(SHAPE) == 3 * 11 * 7
    assert sparse.flops(16, 4).by_op()["score"] == sum(3 * k * lm.config.d_inner for k in sparse.keep_counts(16)[:-1])


def test_a_matrix_product_counts_two_per_multiply_add(user_file: None) -> None:
    assert CRITERIA.build("my_criteria.Product").flops(SHAPE) == 2 * 11 * 7 * 4 + 11 * 4


def test_our_own_op_inside_a_users_criterion_costs_what_it_costs(user_file: None) -> None:
    built_in = CRITERIA.build({"class_path": "global_impact", "init_args": {"reduce": "l2", "gated": True}})
    assert CRITERIA.build("my_criteria.Wrapped").flops(SHAPE) == built_in.flops(SHAPE)


@pytest.mark.parametrize("name", ["PerChannel", "Transposed", "NoTensor"])
def test_scores_of_the_wrong_shape_are_refused_when_counted_and_when_run(user_file: None, name: str) -> None:
    criterion = CRITERIA.build(f"my_criteria.{name}")
    refused = rf"criterion my_criteria\.{name}: score must return \(batch, tokens\)"
    with pytest.raises(InputError, match=refused):
        criterion.flops(SHAPE)
    sparse = tiny_model().sparsified(criterion=criterion, schedule="linear", final_keep=0.2)
    with pytest.raises(InputError, match=refused):
        sparse(random_tokens(2, 9), n_context=9)


@pytest.mark.parametrize("name", ["Peeking", "Counting", "Listing", "ThroughNumpy"])
def test_a_cost_that_depends_on_data_is_refused(user_file: None, name: str) -> None:
    with pytest.raises(InputError, match=f"criterion my_criteria.{name}: its cost cannot be counted") as caught:
        CRITERIA.build(f"my_criteria.{name}").flops(SHAPE)
    assert "\n" not in str(caught.value)


class Watched(Criterion):
    def __init__(self) -> None:
        self.devices: list[str] = []

    def score(self, signals: Signals) -> Tensor:
        self.devices.append(signals.x.device.type)
        return signals.x.sum(-1)


def test_nothing_is_measured_while_no_ledger_is_open() -> None:
    criterion = Watched()
    sparse = tiny_model().sparsified(criterion=criterion, schedule="linear", final_keep=0.2)
    sparse(random_tokens(1, 9), n_context=9)
    assert criterion.devices == ["cpu"] * 3
    with recording(Ledger()):
        sparse(random_tokens(1, 9), n_context=9)
    assert sorted(criterion.devices) == ["cpu"] * 6 + ["meta"] * 3


def test_a_criterion_without_score_cannot_be_built() -> None:
    with pytest.raises(InputError, match="abstract"):
        CRITERIA.build(f"{__name__}.Scoreless")


class Scoreless(Criterion):
    pass
