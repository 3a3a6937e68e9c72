"""What defines a model's weights: one frozen record, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simba_lab.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """Shape and initialisation of a Mamba-1 language model; names follow state-spaces' ``MambaConfig``.

    Args:
        d_model: width of the residual stream.
        n_layer: number of Mamba layers.
        vocab_size: number of tokens before padding.
        d_state: states per inner channel (N).
        d_conv: taps of the causal convolution.
        expand: inner channels per model channel.
        dt_rank: rank of the step-size projection; None is ceil(d_model / 16).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: initial step sizes are raised to at least this.
        norm_eps: added to the mean square in the RMS norms.
        tie_embeddings: share the weights of embedding and head.
        pad_vocab_size_multiple: the embedding has vocab_size rounded up to a multiple of this.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8

    def __post_init__(self) -> None:
        for key in ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"model.{key} must be an integer of at least 1, got {value!r}")
        if self.dt_rank is not None and (not isinstance(self.dt_rank, int) or self.dt_rank < 1):
            raise InputError(f"model.dt_rank must be an integer of at least 1 or null, got {self.dt_rank!r}")
        if not 0 < self.dt_min <= self.dt_max:
            raise InputError(f"model.dt_min must lie in (0, dt_max], got {self.dt_min} with dt_max {self.dt_max}")
        if self.dt_init_floor <= 0 or self.norm_eps <= 0:
            raise InputError("model.dt_init_floor and model.norm_eps must be above 0")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Raises InputError that names an unknown or missing key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise InputError(f"model.{key} is not an option of the model; its options: {', '.join(fields)}")
        for key, field in fields.items():
            if field.default is dataclasses.MISSING and key not in values:
                raise InputError(f"model.{key} is required")
        return cls(**values)
