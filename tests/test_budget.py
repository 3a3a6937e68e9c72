"""Counting FLOPs: closed form, fvcore, the ledger, torch's counter and numbers found by hand agree exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simba_lab.budget import CostMismatch, UncountedOperation, count_forward, verify
from simba_lab.errors import InputError
from simba_lab.kernels import cost
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import PUBLISHED, parameter_count, published_shape
from simba_lab.pruning import CRITERIA, SCHEDULES, Criterion, Signals
from simba_lab.pruning.criteria import GlobalImpact, Norm

TINY = ModelConfig(d_model=4, n_layer=2, vocab_size=10, d_state=2, d_conv=3)  # 8 inner channels, rank 1, 16 words
SMALL = ModelConfig(d_model=10, n_layer=5, vocab_size=37, d_state=3)
KNOBS: dict[str, dict[str, Any]] = {
    "geometric": {"final_keep": 0.2},
    "highway_top": {"keep": 0.3},
    "knots": {"values": [0.7, 0.4], "stretch": 0.4},
    "linear": {"final_keep": 0.1},
    "uniform": {"keep": 0.4},
    "calibrated": {"rates": [0.5, 0.2], "rise": [[0.3, 0.4], [0.1, 0.3]], "keep": 0.4},
}


def on_meta(config: ModelConfig, **plan: Any) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config, seed=None)
    return model.sparsified(**plan) if plan else model


class SquaredStep(Criterion):
    """A user's criterion: states no cost."""

    def score(self, signals: Signals) -> torch.Tensor:
        return (signals.delta * signals.delta).sum(-1)


class Undeclared(Norm):
    """Claims the cost of ``norm`` and does more."""

    def score(self, signals: Signals) -> torch.Tensor:
        return super().score(signals).cos()


class HiddenProduct(Norm):
    """Multiplies floating-point numbers under a name that is free for integers only."""

    def score(self, signals: Signals) -> torch.Tensor:
        return super().score(signals) * 2.0


class Understated(GlobalImpact):
    def flops(self, shape: Any) -> int:
        return super().flops(shape) - 1


OPS = ("in_proj", "causal_conv", "x_proj", "dt_proj", "selective_scan", "out_proj")
DENSE_LAYER = dict(zip(OPS, (896, 336, 560, 112, 1008, 448), strict=True))
SPARSE_LAYER = dict(zip(OPS, (512, 192, 320, 64, 576, 256), strict=True))


def test_dense_counts_by_hand() -> None:
    """5 + 2 tokens: in_proj 2 x 7 x 4 x 16, conv 2 x 7 x 8 x 3, x_proj 2 x 7 x 8 x (1 + 4), scan 9 x 7 x 8 x 2, ..."""
    expected = {(layer, op): flops for layer in (0, 1) for op, flops in DENSE_LAYER.items()}
    assert count_forward(on_meta(TINY), 5, 2).entries == expected | {(-1, "head"): 2 * 3 * 4 * 16}
    assert verify(on_meta(TINY), 5, 2).total == 2 * 3360 + 384 == 7104
    assert verify(on_meta(TINY), 5, 2, head="all").total == 2 * 3360 + 896


def test_pruned_counts_by_hand() -> None:
    """Two of five context tokens stay. Score: 5 x (4 x 8 x 2 + 2 + 4 x 8); select: 5 x ceil(log2 5)."""
    model = on_meta(TINY, criterion="global_impact", schedule="uniform", keep=0.4)
    expected = {(0, op): flops for op, flops in DENSE_LAYER.items()} | {(0, "score"): 490, (0, "select"): 15}
    expected |= {(1, op): flops for op, flops in SPARSE_LAYER.items()} | {(-1, "head"): 384}
    counted = count_forward(model, 5, 2)
    assert counted.entries == expected
    assert counted.total == 3360 + 490 + 15 + 1920 + 384 == 6169
    assert verify(model, 5, 2).training().total == 3 * (3360 + 1920 + 384) + 490 + 15


@pytest.mark.parametrize(
    ("name", "gflops", "projections", "scan", "head"),
    [
        ("mamba-130m", 0.262, 0.684, 0.020, 0.295),
        ("mamba-370m", 0.753, 0.843, 0.019, 0.137),
        ("mamba-1.4b", 2.77, 0.915, 0.010, 0.074),
        ("mamba-2.8b", 5.57, 0.945, 0.009, 0.046),
    ],
)
def test_published_shapes_per_token(name: str, gflops: float, projections: float, scan: float, head: float) -> None:
    one_token = on_meta(PUBLISHED[name]).flops(1, 0, head="all")
    table = one_token.by_op()
    assert one_token.total / 1e9 == pytest.approx(gflops, rel=2e-3)
    shares = {op: flops / one_token.total for op, flops in table.items()}
    products = sum(share for op, share in shares.items() if op.endswith("_proj"))
    assert products == pytest.approx(projections, abs=6e-4)
    assert shares["selective_scan"] == pytest.approx(scan, abs=6e-4)
    assert shares["head"] == pytest.approx(head, abs=6e-4)


def test_mamba_130m_to_the_last_digit() -> None:
    assert on_meta(PUBLISHED["mamba-130m"]).flops(1, 0, head="all").total == 262_139_904
    assert verify(on_meta(PUBLISHED["mamba-130m"]), 2048, 64).total == 395_549_503_488


def test_published_parameter_counts() -> None:
    published = {
        "mamba-130m": 129_135_360,
        "mamba-370m": 371_516_416,
        "mamba-790m": 793_204_224,
        "mamba-1.4b": 1_372_178_432,
        "mamba-2.8b": 2_768_345_600,
    }
    assert {name: parameter_count(PUBLISHED[name]) for name in published} == published


@pytest.mark.parametrize("config", [TINY, SMALL, ModelConfig(12, 3, 8, dt_rank=5, expand=3, tie_embeddings=False)])
def test_parameter_count_is_what_the_model_has(config: ModelConfig) -> None:
    assert parameter_count(config) == sum(p.numel() for p in on_meta(config).parameters())


def test_unknown_shape_lists_what_there_is() -> None:
    assert published_shape("state-spaces/mamba-370m") is PUBLISHED["mamba-370m"]
    with pytest.raises(InputError, match="did you mean mamba-130m.*mamba-2.8b"):
        published_shape("mamba-13m")


CRITERION_SPECS = [*CRITERIA.names()] + [
    {"class_path": "global_impact", "init_args": {"reduce": reduce, "gated": gated}}
    for reduce, gated in (("l2", True), ("absmax", True), ("l2", False))
]


@pytest.mark.parametrize("criterion", CRITERION_SPECS, ids=str)
def test_fvcore_confirms_every_criterion(criterion: Any) -> None:
    model = on_meta(SMALL, criterion=criterion, schedule="linear", final_keep=0.1, protect_recent=0.3)
    closed = verify(model, 23, 6)
    assert [key for key in closed.entries if key[1] == "score"] == [(layer, "score") for layer in range(4)]


@pytest.mark.parametrize("schedule", SCHEDULES.names())
@pytest.mark.parametrize(("n_context", "n_suffix", "head"), [(37, 3, "scored"), (16, 0, "all"), (1, 1, "scored")])
def test_fvcore_confirms_every_schedule(schedule: str, n_context: int, n_suffix: int, head: str) -> None:
    verify(on_meta(SMALL, criterion="norm", schedule=schedule, **KNOBS[schedule]), n_context, n_suffix, head)


def test_half_precision_and_an_untied_head_cost_the_same() -> None:
    untied = ModelConfig(10, 5, 37, d_state=3, tie_embeddings=False)
    expected = on_meta(SMALL).flops(9, 2)
    assert verify(on_meta(untied).bfloat16(), 9, 2) == expected


def test_a_users_criterion_is_measured_and_counted_once() -> None:
    """Per token and channel: bias and softplus for either use of delta, product, sum; 8 channels, 5 tokens."""
    model = on_meta(TINY, criterion={"class_path": f"{__name__}.SquaredStep"}, schedule="uniform", keep=0.4)
    counted = count_forward(model, 5, 2)
    assert counted.entries[0, "score"] == 5 * 8 * 6
    assert counted == verify(model, 5, 2)


@pytest.mark.parametrize(("criterion", "operation"), [(Undeclared, "aten::cos"), (HiddenProduct, "aten::mul on float")])
def test_an_operation_without_a_cost_stops_the_count(criterion: type[Criterion], operation: str) -> None:
    model = on_meta(SMALL, criterion=criterion(), schedule="uniform", keep=0.5)
    with pytest.raises(UncountedOperation, match=rf"{operation}.* ran in scores\.0"):
        count_forward(model, 9, 1)


def head_on(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every model's head runs on a changed hidden stream."""
    original = LanguageModel._head
    monkeypatch.setattr(LanguageModel, "_head", lambda model, hidden, *others: original(model, change(hidden), *others))


def test_an_operation_of_the_model_without_a_cost_stops_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """``relu`` is on fvcore's own list of operations to skip; it must not be on ours."""
    head_on(monkeypatch, torch.relu)
    with pytest.raises(UncountedOperation, match="aten::relu ran in model "):
        count_forward(on_meta(SMALL), 9, 1)


def test_a_matrix_product_in_an_unknown_place_stops_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    head_on(monkeypatch, lambda hidden: hidden @ hidden.transpose(1, 2) @ hidden)
    with pytest.raises(UncountedOperation, match="matmul ran in model, where"):
        count_forward(on_meta(SMALL), 9, 1)


def test_a_wrong_cost_is_named_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    understated = on_meta(TINY, criterion=Understated(), schedule="uniform", keep=0.4)
    with pytest.raises(CostMismatch, match="score in layer 0: closed form 489 FLOPs, fvcore 490 FLOPs"):
        verify(understated, 5, 2)
    monkeypatch.setattr(cost, "linear", lambda rows, d_in, d_out: rows * d_in * d_out)
    with pytest.raises(CostMismatch, match="head outside the layers: closed form 192 FLOPs, fvcore 384 FLOPs"):
        verify(on_meta(TINY), 5, 2)


def test_compiled_and_altered_models_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"model is compiled \(OptimizedModule\)"):
        count_forward(torch.compile(on_meta(TINY)), 5, 2)
    inner = on_meta(TINY)
    inner.backbone.layers[1].mixer.compile()
    with pytest.raises(InputError, match=r"model\.backbone\.layers\.1\.mixer is compiled \(Mixer\)"):
        count_forward(inner, 5, 2)
    swapped = on_meta(TINY)
    swapped.backbone.layers[0].mixer.out_proj = torch.nn.Linear(8, 4, device="meta")
    with pytest.raises(InputError, match=r"model\.backbone\.layers\.0\.mixer\.out_proj is a Linear"):
        count_forward(swapped, 5, 2)
    resized = on_meta(TINY)
    resized.lm_head.weight = torch.nn.Parameter(torch.empty(24, 4, device="meta"))
    with pytest.raises(InputError, match=r"model\.lm_head\.weight has shape \(24, 4\)"):
        count_forward(resized, 5, 2)


def test_counting_charges_nothing_to_an_open_ledger() -> None:
    with recording(Ledger()) as ledger:
        verify(on_meta(TINY, criterion="norm", schedule="uniform", keep=0.4), 5, 2)
    assert ledger.total == 0


@pytest.mark.parametrize("plan", [{}, {"criterion": "global_impact", "schedule": "linear", "final_keep": 0.2}])
def test_the_ledger_of_a_training_step_is_the_closed_form(plan: dict[str, Any]) -> None:
    model = LanguageModel(SMALL, backend="reference")
    model = model.sparsified(**plan) if plan else model
    with recording(Ledger()) as ledger:
        model(torch.randint(37, (3, 20)), n_context=17).logits.sum().backward()
    expected = model.flops(17, 3).training()
    assert ledger.by_op() == {op: 3 * flops for op, flops in expected.by_op().items()}


def test_backward_of_the_matrix_products_costs_twice_their_forward() -> None:
    """torch's own counter sees matrix products only, forward and backward, and counts 2 FLOPs a multiply-add."""
    model = LanguageModel(SMALL, backend="reference")
    linear = {"in_proj", "x_proj", "dt_proj", "out_proj", "head"}
    forward = sum(flops for op, flops in model.flops(1, 10, head="all").by_op().items() if op in linear)
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.randint(37, (1, 11))).logits.sum()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward
