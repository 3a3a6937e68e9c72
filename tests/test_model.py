"""The model against independent twins, its initialisation, and the exactness rules of pruning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_oracle import assert_equal_to_the_oracle, random_tokens, tiny_model
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig, Output
from simba_lab.model.mamba import Block
from simba_lab.pruning import CRITERIA, SCHEDULES

SCHEDULE_SPECS: dict[str, dict] = {
    "uniform": {"keep": 0.4},
    "linear": {"final_keep": 0.1},
    "geometric": {"final_keep": 0.1},
    "highway_top": {"keep": 0.3, "from_layer": 0.5},
    "knots": {"values": [0.9, 0.4, 0.1]},
    "calibrated": {"rates": [0.5, 0.2], "rise": [[0.3, 0.4], [0.1, 0.3], [0.0, 0.2]], "keep": 0.4},
}
every_criterion = pytest.mark.parametrize("criterion", CRITERIA.names())
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.names())


def pruned(lm: LanguageModel, criterion: str, schedule: str = "linear", protect_recent: float = 0.0) -> LanguageModel:
    spec = {"class_path": schedule, "init_args": SCHEDULE_SPECS[schedule]}
    return lm.sparsified(criterion=criterion, schedule=spec, protect_recent=protect_recent)


def same_kept(a: Output, b: Output) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.kept, b.kept, strict=True))


def close(a: Tensor, b: Tensor) -> None:
    tolerance = 1e-10 if a.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def decoding_equals_one_pass(
    sparse: LanguageModel, tokens: Tensor, n_context: int, *cuttings: Sequence[int]
) -> Output:
    """The one pass. Each cutting bounds the pieces in which the suffix is decoded after the prefill."""
    whole, prefix = sparse(tokens, n_context=n_context), sparse.prefill(tokens[:, :n_context])
    assert same_kept(whole, prefix)
    for bounds in cuttings:
        logits, states = [prefix.logits], prefix.states
        for start, end in itertools.pairwise(bounds):
            new, states = sparse.extend(tokens[:, n_context + start : n_context + end], states)
            logits.append(new)
        close(torch.cat(logits, dim=1), whole.logits)
        for state, expected in zip(states, whole.states, strict=True):
            close(state.conv, expected.conv)
            close(state.ssm, expected.ssm)
    return whole


def test_every_registered_schedule_is_tried_here() -> None:
    assert sorted(SCHEDULE_SPECS) == SCHEDULES.names()


# 1. Keeping everything is the dense model


@every_criterion
@every_schedule
def test_keeping_everything_equals_dense_bit_for_bit(criterion: str, schedule: str) -> None:
    lm, tokens = tiny_model(dtype=torch.float32), random_tokens(2, 21)
    options = {"knots": {"values": [1.0, 1.0]}, "highway_top": {"keep": 1.0}, "uniform": {"keep": 1.0}}
    options["calibrated"] = {**SCHEDULE_SPECS["calibrated"], "keep": 1.0}
    spec = {"class_path": schedule, "init_args": options.get(schedule, {"final_keep": 1.0})}
    sparse = lm.sparsified(criterion=criterion, schedule=spec)
    dense_out, out = lm(tokens, n_context=16), sparse(tokens, n_context=16)
    assert torch.equal(out.logits, dense_out.logits) and same_kept(out, dense_out)
    assert torch.equal(out.logits, lm(tokens).logits[:, 15:])
    losses = [o.logits.square().sum() for o in (dense_out, out)]
    gradients = [torch.autograd.grad(loss, list(lm.parameters())) for loss in losses]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# 2. One pass equals prefill and decoding


@every_criterion
@every_schedule
@settings(max_examples=5)
@given(
    n_context=st.integers(1, 23), n_suffix=st.integers(0, 5), seed=st.integers(0, 99),
    protect=st.sampled_from([0.0, 0.5]), cuts=st.sets(st.integers(1, 4)), single=st.booleans(),
)  # fmt: skip
def test_one_pass_equals_prefill_and_decoding_in_any_pieces(
    criterion: str, schedule: str, n_context: int, n_suffix: int, seed: int, protect: float, cuts: set[int],
    single: bool,
) -> None:  # fmt: skip
    lm = tiny_model(dtype=torch.float32 if single else torch.float64)
    sparse = pruned(lm, criterion, schedule, protect)
    tokens = random_tokens(2, n_context + n_suffix, seed)
    with torch.no_grad():
        token_by_token = range(n_suffix + 1)
        in_pieces = sorted({0, n_suffix} | {cut for cut in cuts if cut < n_suffix})
        whole = decoding_equals_one_pass(sparse, tokens, n_context, token_by_token, in_pieces)
    assert [kept.shape[1] for kept in whole.kept] == sparse.keep_counts(n_context)


def test_no_tokens_to_extend_by_change_nothing() -> None:
    sparse = pruned(tiny_model(), "global_impact")
    states = sparse.prefill(random_tokens(2, 9)).states
    logits, after = sparse.extend(random_tokens(2, 0), states)
    assert logits.shape == (2, 0, 24)
    assert all(torch.equal(a.ssm, b.ssm) and torch.equal(a.conv, b.conv) for a, b in zip(states, after, strict=True))


# 3. Causality


@every_criterion
def test_a_suffix_token_decides_nothing_before_it(criterion: str) -> None:
    sparse, tokens, n_context = pruned(tiny_model(), criterion), random_tokens(2, 22), 17
    before = sparse(tokens, n_context=n_context)
    for place in range(n_context, 22):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        after = sparse(changed, n_context=n_context)
        row = place - n_context + 1  # of the first logits that may see the change
        assert same_kept(before, after)
        assert torch.equal(before.logits[:, :row], after.logits[:, :row])
        assert not torch.isclose(before.logits[:, row:], after.logits[:, row:]).all(dim=-1).any()


@every_criterion
def test_every_context_token_matters_even_where_it_was_dropped(criterion: str) -> None:
    sparse, tokens = pruned(tiny_model(), criterion), random_tokens(2, 14)
    before = sparse(tokens, n_context=11)
    for place in range(11):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        assert (sparse(changed, n_context=11).logits[:, 0] - before.logits[:, 0]).abs().amax() > 1e-9


def test_dense_is_causal() -> None:
    lm, tokens = tiny_model(), random_tokens(2, 19)
    before = lm(tokens)
    for place in range(19):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 19
        after = lm(changed)
        assert torch.equal(before.logits[:, :place], after.logits[:, :place])
        assert not torch.isclose(before.logits[:, place], after.logits[:, place]).all()
    assert not before.acausal and not lm(tokens, protocol="full").acausal


def test_full_protocol_is_labelled_acausal_and_is() -> None:
    sparse, tokens = pruned(tiny_model(), "global_impact"), random_tokens(2, 20)
    out = sparse(tokens, protocol="full")
    assert out.acausal and not sparse(tokens, n_context=15).acausal
    assert [kept.shape[1] for kept in out.kept] == sparse.keep_counts(20)
    assert torch.equal(out.positions, out.kept[-1]) and out.logits.shape[1] == sparse.keep_counts(20)[-1]
    earlier = set()
    for last in range(19):
        tokens[:, -1] = last
        earlier.add(str([kept[:, :-1].tolist() for kept in sparse(tokens, protocol="full").kept]))
    assert len(earlier) > 1  # the last token decides which of those before it are kept


# 4. Batches and padding


@every_criterion
@every_schedule
def test_a_sequence_gives_the_same_alone_in_any_batch_and_with_padding(criterion: str, schedule: str) -> None:
    sparse, tokens = pruned(tiny_model(), criterion, schedule), random_tokens(5, 24)
    together = sparse(tokens, n_context=19)
    padded = torch.cat([tokens, torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    everyone = [4, 2, 0, 1, 3]
    for order, batch in (([3], tokens), (everyone, tokens), ([1, 1], tokens), (everyone, padded), ([2], padded)):
        other = sparse(batch[order], n_context=19)
        assert all(torch.equal(a, b[order]) for a, b in zip(other.kept, together.kept, strict=True))
        close(other.logits[:, :6], together.logits[order])


# 5. What comes out


@every_schedule
def test_kept_positions_are_nested_ascending_and_end_at_the_boundary(schedule: str) -> None:
    sparse, tokens = pruned(tiny_model(), "global_impact", schedule), random_tokens(3, 25)
    out = sparse(tokens, n_context=21, head="all")
    assert [kept.shape for kept in out.kept] == [(3, k) for k in sparse.keep_counts(21)]
    for i in range(3):
        levels = [kept[i].tolist() for kept in out.kept]
        assert levels[0] == list(range(21))
        assert all(level == sorted(set(level)) and level[-1] == 20 for level in levels)
        assert all(set(upper) <= set(lower) for lower, upper in itertools.pairwise(levels))
        assert out.positions[i].tolist() == levels[-1] + [21, 22, 23, 24]
    scored = sparse(tokens, n_context=21)
    assert scored.positions.tolist() == [[20, 21, 22, 23, 24]] * 3
    close(out.logits[:, -5:], scored.logits)


def test_protected_tokens_are_the_newest_of_each_kept_set() -> None:
    out = pruned(tiny_model(), "random", "uniform", protect_recent=0.5)(random_tokens(2, 20), n_context=20)
    for kept in out.kept[1:]:
        assert kept.shape[1] == 8 and kept[:, -4:].tolist() == [[16, 17, 18, 19]] * 2


# 7. The whole pruned model against the oracle


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("criterion", ["global_impact", "local_delta", "norm", "recency"])
@pytest.mark.parametrize("n_context", [1, 13])
def test_pruned_logits_kept_and_gradients_equal_the_slow_oracle(backend: str, criterion: str, n_context: int) -> None:
    lm = tiny_model(backend=backend, n_layer=3)
    assert_equal_to_the_oracle(pruned(lm, criterion), criterion, random_tokens(2, n_context + 3), n_context)


# Twins


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_dense_equals_transformers(backend: str) -> None:
    """transformers' Mamba with the same weights: logits and every gradient, in fp32 (it computes its scan in fp32)."""
    from transformers import MambaConfig, MambaForCausalLM

    lm = tiny_model(dtype=torch.float32, backend=backend, d_model=20, d_state=5, vocab_size=24, n_layer=3)
    shape = {"vocab_size": 24, "hidden_size": 20, "state_size": 5, "num_hidden_layers": 3, "time_step_rank": 2}
    twin = MambaForCausalLM(MambaConfig(**shape, use_cache=False))
    renamed = {name.replace("embedding.", "embeddings."): value for name, value in lm.state_dict().items()}
    twin.load_state_dict(renamed)
    tokens = random_tokens(2, 21, vocab_size=24)
    ours, theirs = lm(tokens).logits, twin(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name.replace("embeddings.", "embedding."): p.grad for name, p in twin.named_parameters()}
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_parameter_names_are_those_of_state_spaces() -> None:
    names = set(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=9)).state_dict())
    mixer = "in_proj.weight conv1d.weight conv1d.bias x_proj.weight dt_proj.weight dt_proj.bias A_log D out_proj.weight"
    layer = {f"backbone.layers.0.mixer.{name}" for name in mixer.split()} | {"backbone.layers.0.norm.weight"}
    assert names == layer | {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"}


# Weights


def test_initialisation_is_mambas() -> None:
    config = ModelConfig(d_model=64, n_layer=9, vocab_size=50, dt_min=0.01, dt_max=0.2)
    lm = LanguageModel(config, seed=3)
    for block in lm.backbone.layers:
        mixer = block.mixer
        delta = F.softplus(mixer.dt_proj.bias)
        assert delta.min() >= 0.01 * (1 - 1e-4) and delta.max() <= 0.2 * (1 + 1e-4)
        assert delta.log().std().item() == pytest.approx(math.log(20) / math.sqrt(12), rel=0.2)
        torch.testing.assert_close(mixer.A, -torch.arange(1.0, 17).expand(128, 16))
        assert torch.equal(mixer.D, torch.ones(128)) and torch.equal(block.norm.weight, torch.ones(64))
        for weight, bound in (
            (mixer.in_proj.weight, 64**-0.5), (mixer.x_proj.weight, 128**-0.5), (mixer.conv1d.weight, 0.5),
            (mixer.dt_proj.weight, 0.5), (mixer.out_proj.weight, (128 * 9) ** -0.5),
        ):  # fmt: skip
            assert bound * 0.95 <= weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.12)
    assert lm.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_small_steps_are_raised_to_the_floor() -> None:
    lm = LanguageModel(ModelConfig(d_model=64, n_layer=1, vocab_size=9, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3))
    delta = F.softplus(lm.backbone.layers[0].mixer.dt_proj.bias)
    assert delta.min().item() == pytest.approx(1e-3, rel=1e-3) and (delta < 1.001e-3).float().mean() > 0.5


def test_the_seed_alone_decides_the_weights() -> None:
    config = ModelConfig(d_model=8, n_layer=2, vocab_size=9)
    first = LanguageModel(config, seed=1).state_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = LanguageModel(config, seed=1).state_dict(), LanguageModel(config, seed=2).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    layers = [first[f"backbone.layers.{layer}.mixer.in_proj.weight"] for layer in range(2)]
    assert not torch.equal(*layers)


def test_the_head_is_tied_only_when_asked() -> None:
    tied = tiny_model()
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    free = tiny_model(tie_embeddings=False)
    assert free.lm_head.weight.data_ptr() != free.backbone.embedding.weight.data_ptr()
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 24 * 6


def test_a_sparse_model_shares_the_weights_of_the_dense_one() -> None:
    lm = tiny_model(dtype=torch.float32)
    sparse = pruned(lm.eval(), "norm")
    assert [p.data_ptr() for p in sparse.parameters()] == [p.data_ptr() for p in lm.parameters()]
    assert not sparse.training and sparse.with_pruning(None).pruning is None and lm.pruning is None
    tokens = random_tokens(1, 9)
    before = lm(tokens).logits
    sparse(tokens, n_context=6).logits.sum().backward()
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter -= 0.1 * parameter.grad
    assert not torch.equal(lm(tokens).logits, before)
    assert torch.equal(sparse.with_pruning(None)(tokens).logits, lm(tokens).logits)


def test_half_precision_runs_with_the_residual_stream_in_single() -> None:
    lm, tokens = tiny_model(dtype=torch.bfloat16), random_tokens(2, 19)
    seen: list[torch.dtype] = []
    for block in lm.backbone.layers:
        block.register_forward_hook(lambda _, __, out: seen.append(out[1].dtype))
    assert isinstance(lm.backbone.layers[0], Block)
    for criterion in CRITERIA.names():
        out = pruned(lm, criterion)(tokens, n_context=16)
        assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert set(seen) == {torch.float32}
    out.logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
    single = tiny_model(dtype=torch.float32)
    single.load_state_dict(lm.state_dict())
    torch.testing.assert_close(lm(tokens).logits.float(), single(tokens).logits, rtol=0.1, atol=0.15)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n_context": 0}, "n_context must lie in 1..8"),
        ({"n_context": 9}, "n_context must lie in 1..8"),
        ({}, "n_context is required"),
        ({"n_context": 5, "head": "last"}, "head"),
        ({"n_context": 5, "protocol": "ful"}, "protocol"),
        ({"n_context": 5, "protocol": "full"}, "n_context"),
    ],
)
def test_calls_that_make_no_sense_are_refused(arguments: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        pruned(tiny_model(), "norm")(random_tokens(1, 8), **arguments)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="at least one token"):
        tiny_model()(random_tokens(1, 0))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"d_model": 0}, "model.d_model"), ({"n_layer": 2.5}, "model.n_layer"), ({"d_state": True}, "model.d_state"),
        ({"dt_rank": 0}, "model.dt_rank"), ({"dt_rank": "auto"}, "model.dt_rank"), ({"dt_rank": 1.5}, "model.dt_rank"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "model.dt_min"), ({"norm_eps": 0}, "norm_eps"),
        ({"d_modle": 8}, "model.d_modle"),
    ],
)  # fmt: skip
def test_a_wrong_model_key_is_named(values: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ModelConfig.from_dict({"d_model": 8, "n_layer": 2, "vocab_size": 9, **values})


def test_a_config_is_plain_data_and_back() -> None:
    config = ModelConfig(d_model=40, n_layer=2, vocab_size=50277, dt_rank=None)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert (config.d_inner, config.rank, config.padded_vocab_size) == (80, 3, 50280)
    with pytest.raises(InputError, match="model.vocab_size is required"):
        ModelConfig.from_dict({"d_model": 8, "n_layer": 2})


def test_an_unknown_backend_criterion_or_schedule_is_named() -> None:
    for make, says in (
        (lambda: tiny_model(backend="tritn"), "backend: 'tritn' is unknown"),
        (lambda: tiny_model().sparsified(criterion="globl_impact", final_keep=0.1), "did you mean global_impact"),
        (lambda: tiny_model().sparsified(schedule="lineer", final_keep=0.1), "did you mean linear"),
        (lambda: tiny_model().sparsified(schedule="linear", keep=0.1), "unknown option 'keep'"),
        (lambda: tiny_model().sparsified(schedule="linear", mean_keep=1.1), "mean_keep"),
    ):
        with pytest.raises(InputError, match=says):
            make()
