"""The closed form: FLOPs of a model by op and layer, from its shape and keep counts alone (design page, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simba_lab.errors import InputError
from simba_lab.kernels import cost
from simba_lab.model.config import ModelConfig
from simba_lab.pruning import PruningPlan, ScoredShape
from simba_lab.pruning.select import protected_count

OUTSIDE = -1
"""Layer number of what belongs to no layer: the head."""


@dataclass(frozen=True)
class Breakdown:
    """FLOPs by (layer, op); layer -1 is the head. Backward passes, where counted, are in the same entries."""

    entries: dict[tuple[int, str], int]

    @property
    def total(self) -> int:
        return sum(self.entries.values())

    def by_op(self) -> dict[str, int]:
        table: dict[str, int] = {}
        for (_, op), flops in self.entries.items():
            table[op] = table.get(op, 0) + flops
        return table

    def by_layer(self) -> dict[int, int]:
        table: dict[int, int] = {}
        for (layer, _), flops in self.entries.items():
            table[layer] = table.get(layer, 0) + flops
        return table

    def training(self) -> Breakdown:
        """Forward plus backward: three times every op that carries gradients; scoring and selection carry none."""
        passes = {"score": 1, "select": 1}
        return Breakdown({(layer, op): passes.get(op, 3) * flops for (layer, op), flops in self.entries.items()})


def layer_flops(config: ModelConfig, tokens: int) -> dict[str, int]:
    """FLOPs by op of one layer on ``tokens`` tokens."""
    flops = _LAYER_FLOPS[config.layer](config, tokens)
    if config.d_intermediate:
        flops["fc1"] = cost.linear(tokens, config.d_model, 2 * config.d_mlp)
        flops["fc2"] = cost.linear(tokens, config.d_mlp, config.d_model)
    return flops


def _mamba1_flops(config: ModelConfig, tokens: int) -> dict[str, int]:
    inner, states, rank = config.d_inner, config.d_state, config.rank
    return {
        "in_proj": cost.linear(tokens, config.d_model, 2 * inner),
        "causal_conv": cost.causal_conv(tokens, inner, config.d_conv),
        "x_proj": cost.linear(tokens, inner, rank + 2 * states),
        "dt_proj": cost.linear(tokens, rank, inner),
        "selective_scan": cost.selective_scan(tokens, inner, states),
        "out_proj": cost.linear(tokens, inner, config.d_model),
    }


def _mamba2_flops(config: ModelConfig, tokens: int) -> dict[str, int]:
    inner, shared = config.d_inner, 2 * config.ngroups * config.d_state
    return {
        "in_proj": cost.linear(tokens, config.d_model, 2 * inner + shared + config.nheads),
        "causal_conv": cost.causal_conv(tokens, inner + shared, config.d_conv),
        "ssd": cost.ssd(tokens, inner, config.d_state),
        "out_proj": cost.linear(tokens, inner, config.d_model),
    }


_LAYER_FLOPS: dict[str, Callable[[ModelConfig, int], dict[str, int]]] = {
    "mamba1": _mamba1_flops,
    "mamba2": _mamba2_flops,
}


def scored_shape(config: ModelConfig, tokens: int, n_free: int) -> ScoredShape:
    """Sizes on which the cost of scoring ``tokens`` tokens, ``n_free`` of which may be dropped, may depend."""
    heads, groups = (config.nheads, config.ngroups) if config.layer == "mamba2" else (None, 1)
    sizes = (tokens, config.d_model, config.d_inner, config.d_state, heads, groups)
    return ScoredShape(*sizes, look_ahead_flops(config, 1), config.n_layer, config.d_conv, n_free)


def scoring_flops(config: ModelConfig, pruning: PruningPlan, tokens: int, kept: int) -> int:
    """FLOPs of scoring the ``tokens`` tokens of a layer after which ``kept`` of them go on."""
    return pruning.criterion.flops(scored_shape(config, tokens, tokens - protected_count(kept, pruning.protect_recent)))


def look_ahead_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of a layer's mixer up to its scan, without its gate: what looking into a later layer costs a criterion."""
    after = {"selective_scan", "ssd", "out_proj", "fc1", "fc2"}
    before = sum(flops for op, flops in layer_flops(config, tokens).items() if op not in after)
    return before - cost.linear(tokens, config.d_model, config.d_inner)


def forward_flops(
    config: ModelConfig, counts: Sequence[int], n_suffix: int, pruning: PruningPlan | None, head: str = "scored"
) -> Breakdown:
    """FLOPs of one sequence whose context enters layer l with ``counts[l]`` tokens, followed by ``n_suffix`` more.

    ``head``: logits for boundary and suffix (``scored``) or for all tokens that reach the last layer (``all``).
    """
    if head not in ("scored", "all"):
        raise InputError(f"head must be scored or all, got {head!r}")
    entries: dict[tuple[int, str], int] = {}
    for layer, count in enumerate(counts):
        for op, flops in layer_flops(config, count + n_suffix).items():
            entries[layer, op] = flops
        if layer + 1 < len(counts) and counts[layer + 1] < count:
            entries[layer, "score"] = scoring_flops(config, pruning, count, counts[layer + 1])
            entries[layer, "select"] = cost.select(count)
    rows = n_suffix + (1 if head == "scored" else counts[-1])
    entries[OUTSIDE, "head"] = cost.linear(rows, config.d_model, config.padded_vocab_size)
    return Breakdown(entries)
