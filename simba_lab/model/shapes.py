"""The published shapes of both generations by name, and how many parameters a shape has."""

from __future__ import annotations

import difflib

from simba_lab.errors import InputError
from simba_lab.model.config import ModelConfig

NEOX_VOCABULARY = 50277
"""Tokens of the GPT-NeoX tokenizer, which every published model uses."""


def _first(d_model: int, n_layer: int) -> ModelConfig:
    return ModelConfig(d_model, n_layer, NEOX_VOCABULARY)


def _second(d_model: int, n_layer: int) -> ModelConfig:
    return ModelConfig(d_model, n_layer, NEOX_VOCABULARY, layer="mamba2", pad_vocab_size_multiple=16)


PUBLISHED: dict[str, ModelConfig] = {
    "mamba-130m": _first(768, 24),
    "mamba-370m": _first(1024, 48),
    "mamba-790m": _first(1536, 48),
    "mamba-1.4b": _first(2048, 48),
    "mamba-2.8b": _first(2560, 64),
    "mamba2-130m": _second(768, 24),
    "mamba2-370m": _second(1024, 48),
    "mamba2-780m": _second(1536, 48),
    "mamba2-1.3b": _second(2048, 48),
    "mamba2-2.7b": _second(2560, 64),
}
"""state-spaces' releases: tied head, d_conv 4, expand 2; d_state 16, or 128 with heads of 64 channels in one group."""


def published_shape(name: str) -> ModelConfig:
    """Shape of a published model; an owner before a slash is ignored. Raises InputError that lists the names."""
    known = name.rpartition("/")[2]
    if known not in PUBLISHED:
        near = difflib.get_close_matches(known, PUBLISHED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"shape {name!r} is unknown{hint}; use one of {', '.join(PUBLISHED)}")
    return PUBLISHED[known]


def parameter_count(config: ModelConfig) -> int:
    """Trainable numbers of the model, padding of the vocabulary included, a tied head counted once."""
    width = config.d_model
    mixer = _mamba1_mixer(config) if config.layer == "mamba1" else _mamba2_mixer(config)
    tables = config.padded_vocab_size * width * (1 if config.tie_embeddings else 2)
    mlp = 3 * width * config.d_mlp + width if config.d_intermediate else 0  # with a norm of its own
    return tables + config.n_layer * (mixer + mlp + width) + width  # a norm per layer and the last one


def _mamba1_mixer(config: ModelConfig) -> int:
    inner, states, rank = config.d_inner, config.d_state, config.rank
    return (
        _projections_and_conv(config, 2 * inner, inner)
        + inner * (rank + 2 * states)  # x_proj
        + (rank + 1) * inner  # dt_proj with bias
        + inner * (states + 1)  # A_log and D
    )


def _mamba2_mixer(config: ModelConfig) -> int:
    inner, heads, shared = config.d_inner, config.nheads, 2 * config.ngroups * config.d_state
    return (
        _projections_and_conv(config, 2 * inner + shared + heads, inner + shared)
        + 3 * heads  # dt_bias, A_log and D
        + inner  # the gated norm
    )


def _projections_and_conv(config: ModelConfig, projected: int, convolved: int) -> int:
    width, inner = config.d_model, config.d_inner
    biases = (projected + width) * config.bias + convolved * config.conv_bias
    return width * projected + inner * width + convolved * config.d_conv + biases
