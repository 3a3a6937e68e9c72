"""The published Mamba-1 shapes by name, and how many parameters a shape has."""

from __future__ import annotations

import difflib

from simba_lab.errors import InputError
from simba_lab.model.config import ModelConfig

_VOCABULARY = 50277  # of the GPT-NeoX tokenizer; padded to 50280

PUBLISHED: dict[str, ModelConfig] = {
    "mamba-130m": ModelConfig(d_model=768, n_layer=24, vocab_size=_VOCABULARY),
    "mamba-370m": ModelConfig(d_model=1024, n_layer=48, vocab_size=_VOCABULARY),
    "mamba-790m": ModelConfig(d_model=1536, n_layer=48, vocab_size=_VOCABULARY),
    "mamba-1.4b": ModelConfig(d_model=2048, n_layer=48, vocab_size=_VOCABULARY),
    "mamba-2.8b": ModelConfig(d_model=2560, n_layer=64, vocab_size=_VOCABULARY),
}
"""state-spaces' releases: tied head, d_state 16, d_conv 4, expand 2."""


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
    width, inner, states, rank = config.d_model, config.d_inner, config.d_state, config.rank
    mixer = (
        width * 2 * inner  # in_proj
        + inner * (config.d_conv + 1)  # conv1d with bias
        + inner * (rank + 2 * states)  # x_proj
        + (rank + 1) * inner  # dt_proj with bias
        + inner * (states + 1)  # A_log and D
        + inner * width  # out_proj
    )
    tables = config.padded_vocab_size * width * (1 if config.tie_embeddings else 2)
    return tables + config.n_layer * (mixer + width) + width  # a norm per layer and the last one
