"""The highways, measured: each number against the same one from its definition, by loops, on tiny models in fp64."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import slow_oracle
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from simba_lab.inspection import Passage, measure_highways, work
from simba_lab.inspection.flow import distance_bins, reach, share_by_distance
from simba_lab.inspection.observing import bypassed
from simba_lab.inspection.path import fewest_scan_steps
from simba_lab.model import LanguageModel
from simba_lab.pruning import Criterion, Signals
from simba_lab.report.highway_figures import highway_figures

CONTEXT, SUFFIX, KEEP = 17, 3, 0.3
KEPT_ALONE = 5  # of 17 at a share of 0.3
SHAPES: dict[str, dict[str, Any]] = {
    "mamba1": {"n_layer": 3},
    "mamba2": {"n_layer": 3, "layer": "mamba2", "d_model": 8, "d_state": 4, "headdim": 4, "ngroups": 2},
}
every_generation = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


class OpenGate(Criterion):
    """A user's own: how far the output gate is open."""

    def score(self, signals: Signals) -> Tensor:
        return F.silu(signals.z).amax(-1)


OWN = f"{__name__}.OpenGate"


def a_passage(windows: int = 2) -> Passage:
    return Passage("random", slow_oracle.random_tokens(windows, CONTEXT + SUFFIX, seed=3), CONTEXT)


def some_arms(model: LanguageModel) -> list[tuple[str, LanguageModel]]:
    return [
        ("impact", model.sparsified("global_impact", "linear", final_keep=0.2)),
        ("own", model.sparsified(OWN, "uniform", mean_keep=0.6)),
    ]


def measured(model: LanguageModel, passage: Passage) -> dict[str, Any]:
    lines: list[str] = []
    result = measure_highways(some_arms(model), passage, KEEP, lines.append)
    assert len(lines) == work(some_arms(model), passage)
    return result


class Explicit:
    """One window by the slow oracle: residual streams and signals of each layer, tokens pruned or bypassing it."""

    def __init__(self, model: LanguageModel, tokens: Tensor, kept: Sequence[Sequence[int]]) -> None:
        """``kept[l]``: context positions that layer l sees; what a dropped token's stream becomes is its own."""
        self.weights, self.config = {k: v.detach() for k, v in model.state_dict().items()}, model.config
        self.streams: list[Tensor] = []
        self.signals: list[Mapping[str, Tensor]] = []
        stream = self.weights["backbone.embedding.weight"][tokens]
        for layer, positions in enumerate(kept):
            rows = [*positions, *range(CONTEXT, len(tokens))]
            prefix = f"backbone.layers.{layer}."
            seen = stream[rows]
            self.streams.append(seen)
            normed = slow_oracle.rms_norm(seen, self.weights[prefix + "norm.weight"], self.config.norm_eps)
            signals = slow_oracle.MIXERS[self.config.layer](self.weights, prefix + "mixer.", self.config, normed, None)
            self.signals.append(signals)
            stream = stream.clone()
            stream[rows] += signals["out"]
        last = slow_oracle.rms_norm(stream, self.weights["backbone.norm_f.weight"], self.config.norm_eps)
        self.logits = last @ self.weights["backbone.embedding.weight"].T

    def nll(self, tokens: Tensor) -> float:
        log = torch.log_softmax(self.logits, -1)
        return -sum(float(log[t - 1, tokens[t]]) for t in range(CONTEXT, len(tokens))) / (len(tokens) - CONTEXT)

    def added(self, layer: int) -> list[float]:
        """Sum over channels of |dy_b(t)| of each token, one explicit term of the unrolled sum at a time."""
        s, b = self.signals[layer], len(self.signals[layer]["x"]) - 1
        terms = (slow_oracle.contribution(t, b, s["x"], s["delta"], s["A"], s["B"], s["C"]) for t in range(b + 1))
        return [float(term.abs().sum()) for term in terms]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@every_generation
def test_redundancy_flow_and_reach_are_their_definitions(shape: dict[str, Any]) -> None:
    model = slow_oracle.tiny_model(**shape)
    passage = a_passage()
    result = measured(model, passage)
    contexts = passage.windows[:, :CONTEXT]
    for row, arm in zip(result["arms"], [model, *(arm for _, arm in some_arms(model))], strict=True):
        kept = arm.prefill(contexts).kept
        windows = [
            (Explicit(model, tokens, positions), positions)
            for tokens, positions in zip(contexts, zip(*(k.tolist() for k in kept), strict=True), strict=True)
        ]
        for layer in range(model.config.n_layer):
            streams = [window.streams[layer] for window, _ in windows]
            near = [mean([cosine(a, b) for a, b in zip(s, s[1:], strict=False)]) for s in streams]
            pairs = [mean([cosine(s[i], s[j]) for i in range(len(s)) for j in range(i)]) for s in streams]
            assert row["neighbour_similarity"][layer] == pytest.approx(mean(near), abs=1e-9)
            assert row["any_pair_similarity"][layer] == pytest.approx(mean(pairs), abs=1e-9)
            shares, reaches = zip(*(by_distance(w.added(layer), p[layer]) for w, p in windows), strict=True)
            assert row["share"][layer] == pytest.approx([mean(column) for column in zip(*shares, strict=True)])
            assert row["reach"][layer] == pytest.approx(mean(reaches))


def by_distance(added: list[float], positions: list[int]) -> tuple[list[float], int]:
    """(share of each distance bin, 1 % reach) from their definitions."""
    distance, total = [CONTEXT - 1 - p for p in positions], sum(added)
    shares = [
        sum(a for a, d in zip(added, distance, strict=True) if low <= d <= high) / total
        for low, high in ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31))
    ]
    farther = {s: sum(a for a, d in zip(added, distance, strict=True) if d > s) for s in range(CONTEXT)}
    return shares, min(s for s, beyond in farther.items() if beyond < 0.01 * total)


@every_generation
def test_contributions_and_the_skip_connection_are_the_output(shape: dict[str, Any]) -> None:
    """What the flow divides into shares is what the layer computes: summed with sign it is the boundary's output."""
    model = slow_oracle.tiny_model(**shape)
    tokens = a_passage(1).windows[0, :CONTEXT]
    window = Explicit(model, tokens, [list(range(CONTEXT))] * model.config.n_layer)
    s = window.signals[1]
    D = window.weights["backbone.layers.1.mixer.D"]
    D = D.repeat_interleave(len(s["x"][0]) // len(D))
    y = slow_oracle.unrolled_scan(s["x"], s["delta"], s["A"], s["B"], s["C"], D)[-1]
    kernel = [s[name] for name in ("x", "delta", "A", "B", "C")]
    terms = [slow_oracle.contribution(t, CONTEXT - 1, *kernel) for t in range(CONTEXT)]
    torch.testing.assert_close(torch.stack(terms).sum(0) + D * s["x"][-1], y)
    assert sum(window.added(1)) >= float((y - D * s["x"][-1]).abs().sum())


@every_generation
def test_loss_rise_is_the_loss_with_tokens_around_one_layer(shape: dict[str, Any]) -> None:
    model = slow_oracle.tiny_model(**shape)
    passage = a_passage()
    result = measured(model, passage)
    assert [row["criterion"] for row in result["loss_rise"]] == ["global_impact", OWN]
    everything = list(range(CONTEXT))
    for row, criterion in zip(result["loss_rise"], ["global_impact", OWN], strict=True):
        rises = [[] for _ in range(model.config.n_layer)]
        for tokens in passage.windows:
            dense = Explicit(model, tokens, [everything] * model.config.n_layer)
            for layer in range(1, model.config.n_layer):
                chosen = explicit_choice(criterion, dense, layer - 1)
                kept = [chosen if other == layer else everything for other in range(model.config.n_layer)]
                rises[layer].append(Explicit(model, tokens, kept).nll(tokens) - dense.nll(tokens))
        assert row["rise"][0] is None and row["error"][0] is None
        for layer in range(1, model.config.n_layer):
            first, second = rises[layer]
            assert row["rise"][layer] == pytest.approx(mean(rises[layer]), abs=1e-9)
            assert row["error"][layer] == pytest.approx(abs(first - second) / 2, abs=1e-9)
            assert max(map(abs, rises[layer])) > 1e-5


def explicit_choice(criterion: str, dense: Explicit, layer: int) -> list[int]:
    signals = {key: value[:CONTEXT] for key, value in dense.signals[layer].items() if key not in ("A", "out")}
    signals["A"] = dense.signals[layer]["A"]
    if criterion == OWN:
        scores = [max(slow_oracle.silu(z).tolist()) for z in signals["z"]]
    else:
        scores = slow_oracle.scores(criterion, signals, list(range(CONTEXT)))
    return slow_oracle.keep_best(scores, KEPT_ALONE)


def test_nobody_bypasses_when_all_are_kept() -> None:
    model = slow_oracle.tiny_model()
    tokens = a_passage().windows
    everything = torch.arange(CONTEXT).expand(2, -1)
    dense = model(tokens, n_context=CONTEXT).logits
    with bypassed(model, 2, everything, CONTEXT):
        assert torch.equal(model(tokens, n_context=CONTEXT).logits, dense)
    with bypassed(model, 2, everything[:, 1:], CONTEXT):
        assert not torch.equal(model(tokens, n_context=CONTEXT).logits, dense)
    assert torch.equal(model(tokens, n_context=CONTEXT).logits, dense)  # nothing stays behind


@given(st.data())
def test_the_path_is_the_shortest_of_the_graph(data: st.DataObject) -> None:
    """Against Dijkstra over (layer, position) with a step of 1 along a layer and of 0 up to the next."""
    length, layers = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    kept = [list(range(length))]
    for _ in range(layers - 1):
        stay = data.draw(st.lists(st.booleans(), min_size=len(kept[-1]), max_size=len(kept[-1])))
        kept.append([p for p, keep in zip(kept[-1], stay, strict=True) if keep or p == length - 1])
    assert sum(fewest_scan_steps(kept)) == dijkstra(kept, length - 1)


def dijkstra(kept: list[list[int]], boundary: int) -> int:
    queue, done = [(0, 0, 0)], set()
    while queue:
        steps, layer, position = heapq.heappop(queue)
        if (layer, position) == (len(kept) - 1, boundary):
            return steps
        if (layer, position) in done:
            continue
        done.add((layer, position))
        later = [p for p in kept[layer] if p > position]
        if later:
            heapq.heappush(queue, (steps + 1, layer, later[0]))
        if layer + 1 < len(kept) and position in kept[layer + 1]:
            heapq.heappush(queue, (steps, layer + 1, position))
    raise AssertionError("no path")


def test_a_dense_path_crosses_every_token_and_a_pruned_one_fewer() -> None:
    arms = measured(slow_oracle.tiny_model(), a_passage())["arms"]
    assert [arm["name"] for arm in arms] == ["dense", "impact", "own"]
    assert sum(arms[0]["scan_steps"]) == CONTEXT - 1
    assert all(sum(arm["scan_steps"]) < CONTEXT - 1 for arm in arms[1:])


def test_distances_and_reach_at_their_edges() -> None:
    assert distance_bins(0) == [(0, 0)]
    assert distance_bins(4) == [(0, 0), (1, 1), (2, 3), (4, 7)]
    distance = torch.tensor([4, 3, 1, 0])
    assert share_by_distance(torch.tensor([1.0, 2, 0, 1]), distance, 4) == [0.25, 0, 0.5, 0.25]
    assert share_by_distance(torch.zeros(4), distance, 4) == [0, 0, 0, 0]
    assert reach(torch.tensor([0.9, 0.0, 0.0, 99.1]), distance) == 0
    assert reach(torch.tensor([1.0, 0.0, 0.0, 99.0]), distance) == 4


def test_many_channels_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = slow_oracle.tiny_model()
    whole = measured(model, a_passage(1))["arms"][0]["share"]
    monkeypatch.setattr("simba_lab.inspection.flow._NUMBERS_AT_ONCE", 1)
    assert measured(model, a_passage(1))["arms"][0]["share"] == [pytest.approx(row) for row in whole]


def test_one_window_has_no_error_and_the_figures_say_what_they_show(tmp_path: Path) -> None:
    result = measured(slow_oracle.tiny_model(), a_passage(1))
    assert all(error is None for row in result["loss_rise"] for error in row["error"])
    figures = {figure.key: figure for figure in highway_figures(result)}
    assert list(figures) == ["redundancy", "loss-rise", "flow", "reach", "path"]
    units = ("no unit, -1 to 1", "nats/token", "Share (%", "tokens of the original", "scan steps")
    for key, unit in zip(figures, units, strict=True):
        assert unit in figures[key].caption and "One window of 17 context tokens." in figures[key].caption
        assert "<text" in figures[key].svg
    rows = [line.split(",") for line in figures["path"].csv.splitlines()[1:]]
    assert math.fsum(float(steps) for arm, _, steps in rows if arm == "dense") == CONTEXT - 1
