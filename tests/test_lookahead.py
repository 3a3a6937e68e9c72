"""Scores of a later layer from the stream of now: what they are, what they cost, and that they see nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from simba_lab.budget.count import verify
from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.cost import look_ahead_flops
from simba_lab.pruning import CRITERIA, Criterion, LookaheadImpact, Signals
from simba_lab.pruning.measure import OperationCounter, check_measured

CONFIGS = {
    "mamba1": ModelConfig(16, 5, 40, d_state=4),
    "biased": ModelConfig(16, 5, 40, d_state=4, bias=True),
    "mamba2": ModelConfig(16, 5, 40, d_state=8, layer="mamba2", headdim=8, ngroups=2, chunk_size=8),
}
N_CONTEXT, N_SUFFIX, TARGET = 37, 6, 3


class Spy(Criterion):
    """Scores as another criterion and keeps what it saw."""

    op = "none"

    def __init__(self, inner: Any = "recency") -> None:
        self.inner, self.seen = CRITERIA.build(inner), []

    def score(self, signals: Signals) -> torch.Tensor:
        self.seen.append((signals, self.inner.score(signals)))
        return self.seen[-1][1]

    def flops(self, shape: Any) -> int:
        return 0


@pytest.fixture(params=CONFIGS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    lm = LanguageModel(CONFIGS[request.param], seed=0).double()
    for name, weight in lm.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return lm


def tokens(batch: int = 3) -> torch.Tensor:
    return torch.randint(40, (batch, N_CONTEXT + N_SUFFIX), generator=torch.Generator().manual_seed(1))


def pruned(lm: LanguageModel, criterion: Any, convolution: str = "adjacent", protect: float = 0.0) -> LanguageModel:
    return lm.sparsified(criterion, "linear", final_keep=0.2, convolution=convolution, protect_recent=protect)


@pytest.mark.parametrize("convolution", ["compacted", "adjacent"])
def test_scores_are_those_of_the_later_layer_on_the_stream_of_now(lm: LanguageModel, convolution: str) -> None:
    spy = Spy(LookaheadImpact(TARGET))
    with torch.no_grad():
        pruned(lm, spy, convolution)(tokens(), n_context=N_CONTEXT)
    own = CRITERIA.build({"class_path": "global_impact", "init_args": {"reduce": "l2"}})
    block = lm.backbone.layers[TARGET]
    for signals, scores in spy.seen:
        if signals.layer >= TARGET:
            torch.testing.assert_close(scores, own.score(signals), rtol=0, atol=0)
            continue
        stream, positions = signals.hidden, signals.positions
        normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + block.norm.eps) * block.norm.weight
        neighbours = None
        if convolution == "adjacent" and positions.shape[1] < N_CONTEXT:
            neighbours = lm.backend.true_neighbours(positions, N_CONTEXT, 0, lm.config.d_conv)
        with torch.no_grad():
            _, _, later = block.mixer(normed, lm.backend, None, neighbours)
        fields = {name: getattr(later, name) for name in ("x", "dt", "B", "C", "z")}
        read = Signals(
            layer=TARGET, backend=lm.backend, dt_bias=block.mixer.dt_bias, A=block.mixer.A, hidden=stream,
            positions=positions, sequence_key=lambda: None, **fields,
        )  # fmt: skip
        torch.testing.assert_close(scores, own.score(read).to(scores.dtype), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            gate = signals.ahead.signals(TARGET, stream).z
        torch.testing.assert_close(gate, later.z, rtol=1e-9, atol=1e-12)
    assert [signals.layer for signals, _ in spy.seen] == [0, 1, 2, 3]


def test_a_share_of_the_depth_names_the_same_layer(lm: LanguageModel) -> None:
    one, other = (pruned(lm, LookaheadImpact(layer))(tokens(), n_context=N_CONTEXT) for layer in (3, 0.6))
    assert all(torch.equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    third = pruned(lm, LookaheadImpact(4))(tokens(), n_context=N_CONTEXT)
    assert not all(torch.equal(a, b) for a, b in zip(one.kept, third.kept, strict=True))


def test_of_several_layers_a_token_counts_as_in_the_one_that_ranks_it_highest(lm: LanguageModel) -> None:
    spies = {layers: Spy(LookaheadImpact(list(layers), 2)) for layers in [(2,), (4,), (2, 4)]}
    for spy in spies.values():
        with torch.no_grad():
            pruned(lm, spy)(tokens(), n_context=N_CONTEXT)
    (_, low), (_, high), (_, both) = (spy.seen[0] for spy in spies.values())
    for sequence in range(len(low)):
        places = []
        for scores in (low[sequence], high[sequence]):
            order = sorted(range(N_CONTEXT), key=lambda token, scores=scores: (float(scores[token]), token))
            places.append([order.index(token) for token in range(N_CONTEXT)])
        assert both[sequence].tolist() == [max(pair) for pair in zip(*places, strict=True)]
    assert both.dtype == torch.float32


def test_a_layer_that_is_reached_stands_for_all_below_it(lm: LanguageModel) -> None:
    own = CRITERIA.build({"class_path": "global_impact", "init_args": {"reduce": "l2"}})
    above = Spy(LookaheadImpact([1, 2]))
    with torch.no_grad():
        pruned(lm, above)(tokens(), n_context=N_CONTEXT)
    assert [signals.layer for signals, _ in above.seen[2:]] == [2, 3]
    for signals, scores in above.seen[2:]:
        assert torch.equal(scores, own.score(signals))


def test_every_layer_that_looks_is_charged(lm: LanguageModel) -> None:
    one, three = (pruned(lm, LookaheadImpact(layer, 2, 1)) for layer in (TARGET, [2, 3, 0.8]))
    costs = [sparse.flops(N_CONTEXT, N_SUFFIX).entries[0, "score"] for sparse in (one, three)]
    assert costs[1] == 3 * (costs[0] + N_CONTEXT * (2 * 6 + 1))  # 37 tokens are ranked in 6 comparisons each
    verify(three, N_CONTEXT, N_SUFFIX)
    spy = Spy()
    with torch.no_grad():
        pruned(lm, spy)(tokens(), n_context=N_CONTEXT)
    assert check_measured(LookaheadImpact([2, 3, 0.8], 2, 1), spy.seen[0][0]).shape == (3, N_CONTEXT)


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 2), (4, 1)])
def test_neighbours_share_the_highest_score(lm: LanguageModel, before: int, after: int) -> None:
    narrow, wide = Spy(LookaheadImpact(TARGET)), Spy(LookaheadImpact(TARGET, before, after))
    for spy in (narrow, wide):
        with torch.no_grad():
            pruned(lm, spy)(tokens(), n_context=N_CONTEXT)
    (_, scores), (_, shared) = narrow.seen[0], wide.seen[0]
    for place in range(N_CONTEXT):
        around = scores[:, max(0, place - after) : place + before + 1].amax(1)
        assert torch.equal(shared[:, place], around)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("convolution", ["compacted", "adjacent"])
def test_the_cost_is_that_of_the_later_layer_up_to_its_scan(lm: LanguageModel, before: int, convolution: str) -> None:
    sparse = pruned(lm, LookaheadImpact(TARGET, before, 1 if before else 0), convolution)
    closed = verify(sparse, N_CONTEXT, N_SUFFIX)
    with recording(Ledger()) as ledger, torch.no_grad():
        sparse(tokens(1), n_context=N_CONTEXT)
    ran = {(layer, op): flops for (_, layer, op), flops in ledger.entries.items()}
    assert ran == {key: flops for key, flops in closed.entries.items() if flops}
    with recording(Ledger()) as ledger, torch.no_grad():
        lm.backbone.layers[TARGET].mixer.ungated(torch.zeros(1, 11, 16, dtype=torch.float64), lm.backend)
    assert look_ahead_flops(lm.config, 11) == sum(ledger.entries.values()) > 0
    own = pruned(lm, {"class_path": "global_impact", "init_args": {"reduce": "l2"}}, convolution)
    more = closed.entries[0, "score"] - own.flops(N_CONTEXT, N_SUFFIX).entries[0, "score"]
    steps = 2 * lm.config.nheads * N_CONTEXT if lm.config.layer == "mamba2" else 0
    shared = (before + 3) * N_CONTEXT if before else 0
    assert more == look_ahead_flops(lm.config, N_CONTEXT) + shared + steps


def test_what_it_executes_is_within_what_it_is_charged(lm: LanguageModel) -> None:
    spy = Spy()
    with torch.no_grad():
        pruned(lm, spy)(tokens(), n_context=N_CONTEXT)
        criterion = LookaheadImpact(TARGET, 2, 1)
        for signals, _ in spy.seen:
            assert check_measured(criterion, signals).shape == signals.positions.shape
        free = LookaheadImpact(TARGET, 2, 1)
        free.flops = lambda shape: shape.n_tokens * shape.ahead // 2
        with pytest.raises(InputError, match="but is charged"):
            check_measured(free, spy.seen[0][0])


@pytest.mark.parametrize("skip", [False, True])
def test_no_suffix_and_no_other_sequence_changes_what_is_kept(lm: LanguageModel, skip: bool) -> None:
    sparse, whole = pruned(lm, LookaheadImpact(TARGET, 2, 1, skip_protected=skip), protect=0.5), tokens()
    with torch.no_grad():
        kept = sparse(whole, n_context=N_CONTEXT).kept
        other = whole.clone()
        other[:, N_CONTEXT:] = (other[:, N_CONTEXT:] + 7) % 40
        again, before = sparse(other, n_context=N_CONTEXT).kept, sparse.prefill(whole[:, :N_CONTEXT]).kept
        alone = sparse(whole[1:2], n_context=N_CONTEXT).kept
    for layer, positions in enumerate(kept):
        assert torch.equal(positions, again[layer]) and torch.equal(positions, before[layer])
        assert torch.equal(positions[1:2], alone[layer])


def mean_step_scores(read: dict[str, Any], n_free: int) -> torch.Tensor:
    """fp64 impact (B, n_free) of the oldest of all tokens, the steps of the others taken to be the mean of theirs."""
    delta, A, B, C = read["delta"], read["A"], read["B"], read["C"]
    if A.dim() == 1:  # heads to channels
        width = read["x"].shape[-1] // len(A)
        delta, A = delta.repeat_interleave(width, -1), A.repeat_interleave(width)[:, None]
        B, C = (value.repeat_interleave(read["x"].shape[-1] // value.shape[2], 2) for value in (B, C))
    else:
        B, C = B[:, :, None], C[:, :, None]
    behind = (delta.shape[1] - n_free) * delta[:, :n_free].mean(1)
    scores = []
    for token in range(n_free):
        decay = torch.exp(A * (delta[:, token + 1 : n_free].sum(1) + behind)[..., None])
        written = (delta[:, token] * read["x"][:, token])[..., None] * B[:, token]
        scores.append((C[:, -1] * decay * written).sum(-1).norm(dim=-1))
    return torch.stack(scores, 1)


@pytest.mark.parametrize("convolution", ["compacted", "adjacent"])
def test_protected_tokens_are_not_read_but_for_their_number_and_the_query(lm: LanguageModel, convolution: str) -> None:
    spy = Spy(LookaheadImpact(TARGET, skip_protected=True))
    sparse = pruned(lm, spy, convolution, protect=0.5)
    counts = sparse.keep_counts(N_CONTEXT)
    with torch.no_grad():
        sparse(tokens(), n_context=N_CONTEXT)
        for signals, scores in spy.seen:
            n_free = len(signals.positions[0]) - max(1, counts[signals.layer + 1] // 2)
            assert signals.n_free == n_free and not scores[:, n_free:].any()
            later = signals if signals.layer == TARGET else signals.ahead.signals(TARGET, signals.hidden)
            read = {name: getattr(later, name) for name in ("x", "delta", "A", "B", "C")}
            torch.testing.assert_close(scores[:, :n_free], mean_step_scores(read, n_free), rtol=1e-9, atol=1e-12)
    assert len(spy.seen) == 4


def test_what_is_not_read_is_not_charged(lm: LanguageModel) -> None:
    options = {"layer": TARGET, "before": 2, "after": 1}
    spy = Spy()
    pruned(lm, spy, protect=0.5)(tokens(), n_context=N_CONTEXT)
    for layers in (TARGET, [2, 3]):
        skipping, whole = (
            LookaheadImpact(**options | {"layer": layers}, skip_protected=skip) for skip in (True, False)
        )
        assert check_measured(skipping, spy.seen[0][0]).shape == (3, N_CONTEXT)
        assert skipping.flops(spy.seen[0][0].shape) < 0.8 * whole.flops(spy.seen[0][0].shape)
    sparse = pruned(lm, LookaheadImpact(**options, skip_protected=True), protect=0.5)
    closed = verify(sparse, N_CONTEXT, N_SUFFIX)
    with recording(Ledger()) as ledger, torch.no_grad():
        sparse(tokens(1), n_context=N_CONTEXT)
    assert {key[1:]: flops for key, flops in ledger.entries.items()} == {
        key: flops for key, flops in closed.entries.items() if flops
    }
    signals = spy.seen[0][0]
    with OperationCounter() as counter, torch.no_grad():
        LookaheadImpact(**options, skip_protected=True).score(signals)
    assert 0.99 < counter.flops / (3 * closed.entries[0, "score"]) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_protected": "yes"}, "skip_protected must be true or false"),
        ({"layer": 0}, "layer must be a share in"), ({"layer": []}, "layer must name at least one layer"),
        ({"layer": [0.6, "top"]}, "got 'top'"), ({"layer": 2.5}, "layer must be a share in"),
        ({"before": -1}, "before must be"), ({"after": True}, "after must be"), ({"reduce": "mean"}, "reduce"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LookaheadImpact(**options)


def test_a_layer_that_the_model_lacks_is_named(lm: LanguageModel) -> None:
    sparse = pruned(lm, LookaheadImpact([3, 9]))
    with pytest.raises(InputError, match="layer 9 is none of 5"):
        sparse(tokens(), n_context=N_CONTEXT)
    with pytest.raises(InputError, match="layer 9 is none of 5"):  # before anything runs
        sparse.flops(N_CONTEXT, N_SUFFIX)
