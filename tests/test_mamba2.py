"""The Mamba-2 model: twins, initialisation, the exactness rules of pruning, FLOPs, budgets and training."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_oracle import assert_equal_to_the_oracle, random_tokens, tiny_model
from test_model import SCHEDULE_SPECS, close, decoding_equals_one_pass, every_criterion, pruned, same_kept
from torch import Tensor

import simba_lab
from simba_lab.budget import Arm, Budget, DenseArm, PrunedArm, match, verify
from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import published_shape
from simba_lab.pruning import CRITERIA, SCHEDULES, Criterion, PruningPlan, Signals, select_mask

# 4 heads of 3 channels in 2 groups; chunks of 8, so that contexts of some 20 tokens end inside the third.
SHAPE: dict[str, Any] = {"layer": "mamba2", "headdim": 3, "ngroups": 2, "chunk_size": 8}
SMALL = ModelConfig(d_model=12, n_layer=5, vocab_size=37, d_state=3, **SHAPE)
BASE = ModelConfig(d_model=64, n_layer=8, vocab_size=64, d_state=16, layer="mamba2", headdim=8)
both_backends = pytest.mark.parametrize("backend", ["numba", "reference"])


def model(**options: Any) -> LanguageModel:
    return tiny_model(**{**SHAPE, **options})


def on_meta(config: ModelConfig, **plan: Any) -> LanguageModel:
    with torch.device("meta"):
        lm = LanguageModel(config, seed=None)
    return lm.sparsified(**plan) if plan else lm


# Rule 1: keeping everything is the dense model


KEEP_ALL = {"knots": {"values": [1.0, 1.0]}, "highway_top": {"keep": 1.0}, "uniform": {"keep": 1.0}}
KEEP_ALL["calibrated"] = {**SCHEDULE_SPECS["calibrated"], "keep": 1.0}


@pytest.mark.parametrize(
    ("criterion", "schedule"),
    [(criterion, "linear") for criterion in CRITERIA.names()]
    + [("global_impact", schedule) for schedule in SCHEDULES.names() if schedule != "linear"],
)
def test_keeping_everything_equals_dense_bit_for_bit(criterion: str, schedule: str) -> None:
    lm, tokens = model(dtype=torch.float32), random_tokens(2, 21)
    spec = {"class_path": schedule, "init_args": KEEP_ALL.get(schedule, {"final_keep": 1.0})}
    dense, out = lm(tokens, n_context=16), lm.sparsified(criterion, spec)(tokens, n_context=16)
    assert torch.equal(out.logits, dense.logits) and same_kept(out, dense)
    assert torch.equal(out.logits, lm(tokens).logits[:, 15:])
    losses = [o.logits.square().sum() for o in (dense, out)]
    gradients = [torch.autograd.grad(loss, list(lm.parameters())) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Rule 2: one pass is prefill and decoding


@every_criterion
@settings(max_examples=4)
@given(
    n_context=st.integers(1, 23), n_suffix=st.integers(0, 5), schedule=st.sampled_from(SCHEDULES.names()),
    seed=st.integers(0, 99), protect=st.sampled_from([0.0, 0.5]), cut=st.integers(1, 4),
)  # fmt: skip
def test_one_pass_equals_prefill_and_decoding_in_any_pieces(
    criterion: str, n_context: int, n_suffix: int, schedule: str, seed: int, protect: float, cut: int
) -> None:
    sparse, tokens = pruned(model(), criterion, schedule, protect), random_tokens(2, n_context + n_suffix, seed)
    with torch.no_grad():
        in_two = sorted({0, min(cut, n_suffix), n_suffix})
        states = decoding_equals_one_pass(sparse, tokens, n_context, range(n_suffix + 1), in_two).states
    assert states[0].conv.shape == (2, 3, 12 + 2 * 2 * 3) and states[0].ssm.shape == (2, 4, 3, 3)


# Rule 3: nothing leaks from the future


@every_criterion
def test_a_suffix_token_decides_nothing_before_it(criterion: str) -> None:
    sparse, tokens, n_context = pruned(model(), criterion), random_tokens(2, 25), 15
    before = sparse(tokens, n_context=n_context)
    for place in (15, 16, 17, 24):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        after, row = sparse(changed, n_context=n_context), place - n_context + 1
        assert same_kept(before, after)
        assert torch.equal(before.logits[:, :row], after.logits[:, :row])
        assert not torch.isclose(before.logits[:, row:], after.logits[:, row:]).all(dim=-1).any()


def test_dense_is_causal_across_chunks() -> None:
    lm, tokens = model(), random_tokens(2, 19)
    before = lm(tokens).logits
    for place in (0, 7, 8, 9, 15, 16, 18):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        after = lm(changed).logits
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.isclose(before[:, place], after[:, place]).all()


# Rule 4: a sequence does not know its batch


@every_criterion
def test_a_sequence_gives_the_same_alone_in_any_batch_and_with_padding(criterion: str) -> None:
    sparse, tokens = pruned(model(), criterion), random_tokens(5, 24)
    together = sparse(tokens, n_context=19)
    padded = torch.cat([tokens, torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    for order, batch in (([3], tokens), ([4, 2, 0, 1, 3], tokens), ([1, 1], tokens), ([2], padded)):
        other = sparse(batch[order], n_context=19)
        assert all(torch.equal(a, b[order]) for a, b in zip(other.kept, together.kept, strict=True))
        close(other.logits[:, :6], together.logits[order])


# Rules 5 and 6: the whole pruned model, chosen by mask in the oracle, by gather in the model


class Seen(Criterion):
    """``global_impact`` that remembers what it scored."""

    op = "global_impact"

    def __init__(self) -> None:
        self.inner, self.seen = CRITERIA.build("global_impact"), []

    def score(self, signals: Signals) -> Tensor:
        self.seen.append((self.inner.score(signals), signals.positions))
        return self.seen[-1][0]


def test_mask_and_gather_keep_the_same_positions() -> None:
    criterion = Seen()
    sparse = model().sparsified(criterion=criterion, schedule="linear", final_keep=0.1)
    out = sparse(random_tokens(3, 23), n_context=20, head="all")
    for (values, positions), kept in zip(criterion.seen, out.kept[1:], strict=True):
        mask = select_mask(values, kept.shape[1])
        assert torch.equal(positions[mask].view(3, -1), kept)
    assert out.positions[:, -3:].tolist() == [[20, 21, 22]] * 3


@both_backends
@pytest.mark.parametrize("criterion", ["global_impact", "local_delta", "norm", "recency"])
@pytest.mark.parametrize("n_context", [1, 13])
def test_pruned_logits_kept_and_gradients_equal_the_slow_oracle(backend: str, criterion: str, n_context: int) -> None:
    lm = model(backend=backend, n_layer=3)
    assert_equal_to_the_oracle(pruned(lm, criterion), criterion, random_tokens(2, n_context + 3), n_context)


def test_half_precision_runs_with_finite_gradients() -> None:
    lm, tokens = model(dtype=torch.bfloat16), random_tokens(2, 19)
    for criterion in CRITERIA.names():
        out = pruned(lm, criterion)(tokens, n_context=16)
        assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    out.logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
    single = model(dtype=torch.float32)
    single.load_state_dict(lm.state_dict())
    torch.testing.assert_close(lm(tokens).logits.float(), single(tokens).logits, rtol=0.1, atol=0.15)


# Twins


def twin_of(lm: LanguageModel, chunk_size: int) -> torch.nn.Module:
    """transformers' Mamba-2 with the weights of ``lm``."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    c = lm.config
    config = Mamba2Config(
        vocab_size=c.padded_vocab_size, hidden_size=c.d_model, state_size=c.d_state, num_hidden_layers=c.n_layer,
        head_dim=c.headdim, num_heads=c.nheads, expand=c.expand, n_groups=c.ngroups, conv_kernel=c.d_conv,
        chunk_size=chunk_size, layer_norm_epsilon=c.norm_eps, use_cache=False, tie_word_embeddings=c.tie_embeddings,
    )  # fmt: skip
    twin = Mamba2ForCausalLM(config).to(lm.lm_head.weight.dtype).eval()
    twin.load_state_dict({name.replace("embedding.", "embeddings."): v for name, v in lm.state_dict().items()})
    return twin


@both_backends
@settings(max_examples=6)
@given(
    groups=st.sampled_from([1, 2]), heads=st.sampled_from([1, 3]), headdim=st.sampled_from([2, 5, 8]),
    states=st.sampled_from([1, 6, 16]), chunk=st.sampled_from([4, 16, 64]), length=st.sampled_from([1, 3, 16, 17, 37]),
    taps=st.sampled_from([2, 4]), tied=st.booleans(),
)  # fmt: skip
def test_dense_equals_transformers(
    backend: str, groups: int, heads: int, headdim: int, states: int, chunk: int, length: int, taps: int, tied: bool
) -> None:
    """Logits in fp32; the twin computes its scan and its gated norm in fp32, so that fp64 says no more."""
    lm = tiny_model(
        dtype=torch.float32, backend=backend, layer="mamba2", d_model=groups * heads * headdim, headdim=headdim,
        ngroups=groups, d_state=states, vocab_size=24, n_layer=2, d_conv=taps, tie_embeddings=tied,
    )  # fmt: skip
    tokens = random_tokens(2, length, vocab_size=24)
    with torch.no_grad():
        torch.testing.assert_close(lm(tokens).logits, twin_of(lm, chunk)(tokens).logits, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers() -> None:
    lm = tiny_model(dtype=torch.float32, layer="mamba2", d_model=20, headdim=5, ngroups=2, d_state=6, vocab_size=24)
    twin, tokens = twin_of(lm, 16), random_tokens(2, 21, vocab_size=24)
    for logits in (lm(tokens).logits, twin(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name.replace("embeddings.", "embedding."): p.grad for name, p in twin.named_parameters()}
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_parameter_names_are_those_of_state_spaces() -> None:
    names = set(LanguageModel(dataclasses.replace(SMALL, n_layer=1)).state_dict())
    mixer = "in_proj.weight conv1d.weight conv1d.bias dt_bias A_log D norm.weight out_proj.weight"
    layer = {f"backbone.layers.0.mixer.{name}" for name in mixer.split()} | {"backbone.layers.0.norm.weight"}
    assert names == layer | {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}


# Config and weights


def test_initialisation_is_as_published() -> None:
    config = ModelConfig(64, 9, 50, d_state=16, layer="mamba2", headdim=1, dt_min=0.01, dt_max=0.2)
    A, steps = [], []
    for block in LanguageModel(config, seed=3).backbone.layers:
        mixer = block.mixer
        A.append(mixer.A)
        steps.append(F.softplus(mixer.dt_bias))
        assert torch.equal(mixer.D, torch.ones(128)) and torch.equal(mixer.norm.weight, torch.ones(128))
        for weight, bound in (
            (mixer.in_proj.weight, 64**-0.5), (mixer.conv1d.weight, 0.5), (mixer.out_proj.weight, (128 * 9) ** -0.5)
        ):  # fmt: skip
            assert bound * 0.95 <= weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)
    A, steps = torch.stack(A), torch.stack(steps)
    assert -16 <= A.min() < -15.9 and -1.1 < A.max() <= -1
    assert (A.mean().item(), A.std().item()) == pytest.approx((-8.5, 15 / math.sqrt(12)), rel=0.05)
    assert 0.01 * (1 - 1e-4) <= steps.min() and steps.max() <= 0.2 * (1 + 1e-4)
    assert steps.log().std().item() == pytest.approx(math.log(20) / math.sqrt(12), rel=0.1)


def test_defaults_belong_to_the_generation() -> None:
    config = ModelConfig(d_model=768, n_layer=24, vocab_size=50277, layer="mamba2")
    assert (config.d_state, config.headdim, config.ngroups, config.chunk_size) == (128, 64, 1, 256)
    assert (config.nheads, config.width_step) == (24, 32)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig(d_model=768, n_layer=24, vocab_size=50277).d_state == 16


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layer": "mamba3"}, "model.layer must be mamba1 or mamba2, got 'mamba3'"),
        ({"d_model": 33, "layer": "mamba2"}, "model.d_model must be a multiple of 32"),
        ({"layer": "mamba2", "headdim": 4, "ngroups": 3}, "model.d_model must be a multiple of 6"),
        ({"layer": "mamba2", "headdim": 0}, "model.headdim"),
        ({"layer": "mamba2", "dt_rank": 4}, "model.dt_rank belongs to layer mamba1"),
        ({"headdim": 32}, "model.headdim belongs to layer mamba2"),
        ({"ngroups": 2}, "model.ngroups belongs to layer mamba2"),
    ],
)
def test_a_wrong_key_is_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ModelConfig.from_dict({"d_model": 32, "n_layer": 2, "vocab_size": 9, **values})


# FLOPs


def test_counts_by_hand() -> None:
    """7 tokens, then 5 + 2 of which 2 + 2 go on; 12 inner channels, 4 heads, 2 groups of 3 states, conv of 24 rows."""
    config = ModelConfig(d_model=6, n_layer=2, vocab_size=10, d_state=3, d_conv=3, **SHAPE)

    def layer(tokens: int) -> dict[str, int]:
        return {
            "in_proj": 2 * tokens * 6 * (24 + 12 + 4), "causal_conv": 2 * tokens * 24 * 3, "ssd": 7 * tokens * 12 * 3,
            "out_proj": 2 * tokens * 12 * 6,
        }  # fmt: skip

    assert verify(on_meta(config), 5, 2).by_layer()[0] == sum(layer(7).values()) == 7140
    sparse = on_meta(config, criterion="global_impact", schedule="uniform", keep=0.4)
    closed = verify(sparse, 5, 2)
    expected = {(0, op): flops for op, flops in layer(7).items()} | {(1, op): n for op, n in layer(4).items()}
    expected |= {(0, "score"): 5 * (2 * 2 * 3 + 5 * 4 + 2 * 12), (0, "select"): 15, (-1, "head"): 2 * 3 * 6 * 16}
    assert closed.entries == expected


CRITERION_SPECS = [*CRITERIA.names()] + [
    {"class_path": "global_impact", "init_args": {"reduce": reduce, "gated": gated}}
    for reduce, gated in (("l2", True), ("absmax", True), ("l2", False))
]


@pytest.mark.parametrize("criterion", CRITERION_SPECS, ids=str)
def test_fvcore_confirms_every_criterion(criterion: Any) -> None:
    closed = verify(on_meta(SMALL, criterion=criterion, schedule="linear", final_keep=0.1), 23, 6)
    assert [key for key in closed.entries if key[1] == "score"] == [(layer, "score") for layer in range(4)]


@pytest.mark.parametrize("schedule", SCHEDULES.names())
def test_fvcore_confirms_every_schedule(schedule: str) -> None:
    lm = on_meta(SMALL, criterion="norm", schedule=schedule, **SCHEDULE_SPECS[schedule])
    for n_context, n_suffix, head in ((37, 3, "scored"), (16, 0, "all")):
        verify(lm, n_context, n_suffix, head)


class PerHead(Criterion):
    """A user's criterion that states no cost; it reads one step size per head."""

    def score(self, signals: Signals) -> Tensor:
        delta = signals.delta
        assert signals.per_head and delta.shape[2:] == (8,) and signals.B.shape[2:] == (2, 3)
        return (delta * signals.heads(signals.x).amax(-1)).sum(-1)


def test_a_users_criterion_is_measured() -> None:
    """Bias and softplus, product, sum over 8 heads; the largest of 24 channels."""
    lm = on_meta(SMALL, criterion={"class_path": f"{__name__}.PerHead"}, schedule="uniform", keep=0.4)
    assert verify(lm, 5, 2).entries[0, "score"] == 5 * (4 * 8 + 24)


@pytest.mark.parametrize(
    ("name", "gflops", "projections", "scan", "head"),
    [("mamba2-130m", 0.291, 0.620, 0.114, 0.266), ("mamba2-2.7b", 5.70, 0.903, 0.052, 0.045)],
)
def test_published_shapes_per_token(name: str, gflops: float, projections: float, scan: float, head: float) -> None:
    config = dataclasses.replace(published_shape(name), pad_vocab_size_multiple=8)
    one_token = on_meta(config).flops(1, 0, head="all")
    shares = {op: flops / one_token.total for op, flops in one_token.by_op().items()}
    assert one_token.total / 1e9 == pytest.approx(gflops, rel=2e-3)
    assert shares["in_proj"] + shares["out_proj"] == pytest.approx(projections, abs=1e-3)
    assert (shares["ssd"], shares["head"]) == pytest.approx((scan, head), abs=1e-3)


@pytest.mark.parametrize("plan", [{}, {"criterion": "global_impact", "schedule": "linear", "final_keep": 0.2}])
@both_backends
def test_the_ledger_of_a_training_step_is_the_closed_form(plan: dict[str, Any], backend: str) -> None:
    lm = LanguageModel(SMALL, backend=backend)
    lm = lm.sparsified(**plan) if plan else lm
    with recording(Ledger()) as ledger:
        lm(torch.randint(37, (3, 20)), n_context=17).logits.sum().backward()
    assert ledger.by_op() == {op: 3 * flops for op, flops in lm.flops(17, 3).training().by_op().items()}


def test_arms_of_both_generations_meet_one_budget() -> None:
    reference = Arm("smaller", dataclasses.replace(BASE, d_model=48), 512, 16)
    plan = PruningPlan(CRITERIA.build("global_impact"), SCHEDULES.construct(SCHEDULES.resolve("linear"), {}))
    narrow = DenseArm("narrow", BASE, 512, 16)
    first = ModelConfig(d_model=64, n_layer=8, vocab_size=64)
    arms = [reference, PrunedArm("pruned", BASE, 512, 16, plan), narrow, DenseArm("mamba1", first, 512, 16, most=96)]
    budget = Budget.of(reference)
    solved = {solution.arm.name: solution for solution in match(arms, Budget(budget.flops, 0.01))}
    assert solved["narrow"].arm.config.d_model == 48 and solved["narrow"].flops == budget.flops
    assert narrow.step == 4
    with pytest.raises(InputError, match="step must be a multiple of 4"):
        DenseArm("narrow", BASE, 512, 16, step=6)


# Training, evaluation, sweeps


def test_a_config_trains_and_its_arms_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains with pruning on; then the commands that users type, on the run folder and the config that made it."""
    text, run_folder = tiny.write_corpus(tmp_path / "text.jsonl"), tmp_path / "run"
    changes = {
        "model.model": {"d_model": 24, "n_layer": 3, "d_state": 4, "layer": "mamba2", "headdim": 8},
        "model.pruning": {"n_context": 96, "mean_keep": 0.6}, "data.init_args.source": str(text),
        "data.init_args.cache_dir": str(tmp_path / "cache"), "trainer.default_root_dir": str(run_folder),
    }  # fmt: skip
    experiment = tiny.write_yaml(tmp_path / "base.yaml", tiny.EXPERIMENT, changes)
    assert tiny.simba_lab("fit", "--config", experiment) == 0
    lm = simba_lab.load(run_folder)
    assert (lm.config.layer, lm.config.nheads, lm.config.ngroups) == ("mamba2", 6, 1)
    untrained = LanguageModel(lm.config, lm.pruning, seed=0)
    assert not any(torch.equal(p, untrained.get_parameter(name)) for name, p in lm.named_parameters())
    assert all(p.isfinite().all() for p in lm.parameters())

    window = ("--n-context", "96", "--n-suffix", "16")
    assert tiny.simba_lab("flops", "--checkpoint", run_folder, *window, "--mean-keep", "0.7") == 0
    assert "fvcore counts the same" in " ".join(capsys.readouterr().out.split())
    evaluation = ("--arms", "dense", "linear:local_delta@0.7", "--windows", "4", "--json", tmp_path / "eval.json")
    assert tiny.simba_lab("eval", "--checkpoint", run_folder, *window, *evaluation) == 0
    rows = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["arms"]
    assert all(row["quality"] == pytest.approx(5.2, abs=0.5) for row in rows) and rows[1]["flops"] < rows[0]["flops"]

    budget = lm.sparsified(mean_keep=0.7).flops(96, 16).total
    sweep = {
        "experiment": str(experiment), "folder": str(tmp_path / "sweep"),
        "budget": {"flops": budget, "tolerance": 0.02},
        "arms": [{"kind": "shorter_context"}, {"criterion": "global_impact", "schedule": "linear"}],
    }  # fmt: skip
    assert tiny.simba_lab("sweep", "--config", tiny.write_yaml(tmp_path / "s.yaml", tiny.SWEEP, sweep)) == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert all(abs(arm["flops"] - budget) <= 0.02 * budget for arm in results["arms"])
