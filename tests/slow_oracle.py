"""A second Mamba, written from the formulas of the paper and sharing no code with the package: the tests' oracle.

One sequence at a time, in fp64, nothing recurrent: every output is the double sum over the tokens before it. It is
differentiable, so that gradients can be compared too. Mamba-2 is Mamba-1 whose channels share: steps and A by head, B
and C by group, so that B and C have a row per channel, (L, D, N), and the same sums serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simba_lab.model import LanguageModel, ModelConfig

Choice = Callable[[int, Mapping[str, Tensor], list[int]], Sequence[int]]


def softplus(value: Tensor) -> Tensor:
    return value.clamp(min=0) + torch.log1p(torch.exp(-value.abs()))


def silu(value: Tensor) -> Tensor:
    return value / (1 + torch.exp(-value))


def contribution(t: int, b: int, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What token t adds to the ungated output of token b >= t, (D,); x and delta (L, D), B and C (L, N)."""
    decay = torch.exp(A * delta[t + 1 : b + 1].sum(0)[:, None])
    return (decay * B[t] * C[b]).sum(-1) * delta[t] * x[t]


def unrolled_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Ungated outputs (L, D) of one sequence."""
    rows = [
        torch.stack([contribution(t, b, x, delta, A, B, C) for t in range(b + 1)]).sum(0) + D * x[b]
        for b in range(len(x))
    ]
    return torch.stack(rows)


def impact_by_removal(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor) -> Tensor:
    """(L, D): how much the boundary's ungated output loses when the input of token t alone is set to 0.

    Runs the recurrence L + 1 times at once in fp64: copy t of the sequence lacks x_t, the last copy lacks nothing.
    """
    x, delta, A, B, C_boundary = (t.double() for t in (x, delta, A, B, C_boundary))
    length, channels = x.shape
    present = torch.cat([1 - torch.eye(length, dtype=torch.float64), torch.ones(1, length, dtype=torch.float64)])
    state = torch.zeros(length + 1, channels, A.shape[1], dtype=torch.float64)
    for t in range(length):
        state = state * torch.exp(delta[t][:, None] * A)
        state = state + present[:, t, None, None] * (delta[t] * x[t])[:, None] * B[t]
    outputs = (state * C_boundary).sum(-1)
    return outputs[-1] - outputs[:-1]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, places: Sequence[int] | None = None) -> Tensor:
    """(L, D) of one sequence, weight (D, W): silu of the weighted sum of the last W inputs.

    ``places`` are those of the tokens in a text of which some are gone: inputs count back to the first that is missing.
    """
    places = range(len(x)) if places is None else places
    width = weight.shape[1]
    rows = []
    for t in range(len(x)):
        total = bias
        for back in range(width):
            if places[t] - back not in places:
                break
            total = total + weight[:, width - 1 - back] * x[t - back]
        rows.append(silu(total))
    return torch.stack(rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def mixer(
    weights: Mapping[str, Tensor], prefix: str, config: ModelConfig, hidden: Tensor, places: Sequence[int] | None
) -> dict[str, Tensor]:
    """Signals of one layer for one sequence (L, d_model), its output under ``out``."""
    w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    projected = hidden @ w["in_proj.weight"].T
    x, z = projected[:, : config.d_inner], projected[:, config.d_inner :]
    x = causal_conv(x, w["conv1d.weight"][:, 0], w["conv1d.bias"], places)
    rank, states = config.rank, config.d_state
    low_rank = x @ w["x_proj.weight"].T
    B, C = low_rank[:, rank : rank + states], low_rank[:, rank + states :]
    delta = softplus(low_rank[:, :rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    A = -torch.exp(w["A_log"])
    y = unrolled_scan(x, delta, A, B, C, w["D"]) * silu(z)
    signals = {"x": x, "z": z, "delta": delta, "steps": delta, "A": A, "B": B, "C": C}
    return {**signals, "out": y @ w["out_proj.weight"].T}


def mixer2(
    weights: Mapping[str, Tensor], prefix: str, config: ModelConfig, hidden: Tensor, places: Sequence[int] | None
) -> dict[str, Tensor]:
    """The same of a Mamba-2 layer, every signal spread over its channels; ``steps`` (L, H) are those of the heads."""
    w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    inner, shared = config.d_inner, config.ngroups * config.d_state
    projected = hidden @ w["in_proj.weight"].T
    z, dt = projected[:, :inner], projected[:, -config.nheads :]
    convolved = causal_conv(projected[:, inner : -config.nheads], w["conv1d.weight"][:, 0], w["conv1d.bias"], places)
    x, B, C = convolved[:, :inner], convolved[:, inner : inner + shared], convolved[:, inner + shared :]
    steps = softplus(dt + w["dt_bias"])
    head = torch.arange(inner) // config.headdim
    group = torch.arange(inner) // (inner // config.ngroups)
    B, C = (t.reshape(len(t), config.ngroups, config.d_state)[:, group] for t in (B, C))
    A = -torch.exp(w["A_log"])[head][:, None].expand(-1, config.d_state)
    gated = unrolled_scan(x, steps[:, head], A, B, C, w["D"][head]) * silu(z)
    runs = gated.reshape(len(gated), config.ngroups, -1), w["norm.weight"].reshape(config.ngroups, -1)
    out = rms_norm(*runs, config.norm_eps).reshape(len(gated), -1) @ w["out_proj.weight"].T
    return {"x": x, "z": z, "delta": steps[:, head], "steps": steps, "A": A, "B": B, "C": C, "out": out}


MIXERS = {"mamba1": mixer, "mamba2": mixer2}


@dataclass(frozen=True)
class Trace:
    """logits (rows, V) of the boundary and the suffix; kept[l]: context positions that entered layer l."""

    logits: Tensor
    kept: list[list[int]]


def run(
    weights: Mapping[str, Tensor], config: ModelConfig, tokens: Tensor, n_context: int, choose: Choice,
    adjacent: bool = False,
) -> Trace:  # fmt: skip
    """One sequence (L,) through the pruned model; ``choose`` names the places (not positions) that go on.

    ``adjacent``: convolutions read true neighbours only.
    """
    stream = weights["backbone.embedding.weight"][tokens]
    positions, kept = list(range(n_context)), []
    for layer in range(config.n_layer):
        kept.append(positions)
        prefix = f"backbone.layers.{layer}."
        normed = rms_norm(stream, weights[prefix + "norm.weight"], config.norm_eps)
        places = [*positions, *range(n_context, len(tokens))] if adjacent else None
        signals = MIXERS[config.layer](weights, prefix + "mixer.", config, normed, places)
        stream = stream + signals["out"]
        if config.d_intermediate:
            normed = rms_norm(stream, weights[prefix + "norm2.weight"], config.norm_eps)
            value, gate = (normed @ weights[prefix + "mlp.fc1.weight"].T).chunk(2, dim=-1)
            stream = stream + (value * silu(gate)) @ weights[prefix + "mlp.fc2.weight"].T
        if layer + 1 < config.n_layer:
            present = len(positions)
            context = {name: value[:present] for name, value in signals.items() if name != "A"}
            places = list(choose(layer, {**context, "A": signals["A"], "hidden": stream[:present]}, positions))
            stream = torch.cat([stream[places], stream[present:]])
            positions = [positions[place] for place in places]
    last = rms_norm(stream, weights["backbone.norm_f.weight"], config.norm_eps)
    rows = last[len(positions) - 1 :]
    return Trace(rows @ weights["backbone.embedding.weight"].T, kept)


def scores(name: str, signals: Mapping[str, Tensor], positions: list[int]) -> list[float]:
    """Scores of the criteria that need no generator, for one sequence."""
    if name == "global_impact":
        boundary = signals["C"][-1]
        impact = impact_by_removal(signals["x"], signals["delta"], signals["A"], signals["B"], boundary)
        return [max(row) for row in impact.tolist()]
    if name == "recency":
        return [float(position) for position in positions]
    vectors = {"local_delta": "steps", "norm": "hidden"}
    return [sum(v * v for v in row) ** 0.5 for row in signals[vectors[name]].tolist()]


def keep_best(values: Sequence[float], k: int) -> list[int]:
    """Places of the k best, ascending: the last always, then by score, of equals the later."""
    ranked = sorted(range(len(values) - 1), key=lambda place: (-values[place], -place))
    return sorted([len(values) - 1, *ranked[: k - 1]])


def oracle_of(
    sparse: LanguageModel, criterion: str, tokens: Tensor, n_context: int
) -> tuple[dict[str, Tensor], list[Trace]]:
    """The oracle's weights, leaves of its graph, and every sequence through it, pruned as ``sparse`` prunes."""
    counts = sparse.keep_counts(n_context)

    def choose(layer: int, signals: Mapping[str, Tensor], positions: list[int]) -> list[int]:
        detached = {name: value.detach() for name, value in signals.items()}
        return keep_best(scores(criterion, detached, positions), counts[layer + 1])

    weights = {name: value.detach().clone().requires_grad_() for name, value in sparse.named_parameters()}
    adjacent = sparse.pruning.convolution == "adjacent"
    return weights, [run(weights, sparse.config, row, n_context, choose, adjacent) for row in tokens]


def assert_equal_to_the_oracle(sparse: LanguageModel, criterion: str, tokens: Tensor, n_context: int) -> None:
    """Kept positions, logits and all gradients of an fp64 model pruned by ``criterion``."""
    weights, traces = oracle_of(sparse, criterion, tokens, n_context)
    out, expected = sparse(tokens, n_context=n_context), torch.stack([trace.logits for trace in traces])
    assert [[kept[i].tolist() for kept in out.kept] for i in range(len(tokens))] == [trace.kept for trace in traces]
    torch.testing.assert_close(out.logits, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (expected * cotangent).sum().backward()
    sparse.zero_grad()
    (out.logits * cotangent).sum().backward()
    for name, parameter in sparse.named_parameters():
        assert torch.allclose(parameter.grad, weights[name].grad, rtol=1e-8, atol=1e-9), name
        assert parameter.grad.abs().max() > 0, name


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float64, backend: str = "auto", **shape: object
) -> LanguageModel:
    """A model small enough for the oracle, with weights far from their initial values, so that every term counts."""
    config = ModelConfig(**{"d_model": 6, "n_layer": 4, "vocab_size": 19, "d_state": 3, **shape})
    lm = LanguageModel(config, backend=backend, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
        for block in lm.backbone.layers:
            bias = block.mixer.dt_bias
            bias.copy_(torch.rand(bias.shape, generator=generator) * 3 - 2)
    return lm


def random_tokens(batch: int, length: int, seed: int = 0, vocab_size: int = 19) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
