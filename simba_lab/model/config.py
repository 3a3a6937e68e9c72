"""What defines a model's weights: one frozen record, saved with every checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simba_lab.errors import InputError

D_STATE = {"mamba1": 16, "mamba2": 128}
"""Generations of the layer, and the states per inner channel that each is published with."""
_ONLY_MAMBA2 = ("headdim", "ngroups", "chunk_size")
_MLP_STEP = 128
_WIDEST = 2**20
_LARGEST = {
    "d_model": _WIDEST, "n_layer": 1024, "vocab_size": 2**24, "d_state": 2**16, "d_conv": 1024, "expand": 64,
    "pad_vocab_size_multiple": _WIDEST, "dt_rank": _WIDEST, "headdim": _WIDEST, "ngroups": _WIDEST,
    "chunk_size": _WIDEST, "d_intermediate": _WIDEST,
}  # fmt: skip
"""Far beyond any model, but the numbers of their weights still fit 64 bits, and a layer is made in milliseconds."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and initialisation of a Mamba language model; names follow state-spaces' ``MambaConfig`` and ``ssm_cfg``.

    Args:
        d_model: width of the residual stream.
        n_layer: number of Mamba layers.
        vocab_size: number of tokens before padding.
        d_state: states per inner channel (N); None is 16 for ``mamba1`` and 128 for ``mamba2``, and is replaced by it.
        d_conv: taps of the causal convolution.
        expand: inner channels per model channel.
        dt_rank: rank of the step-size projection; None is ceil(d_model / 16). Only ``mamba1`` has one.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: initial step sizes are raised to at least this.
        norm_eps: added to the mean square in the RMS norms.
        tie_embeddings: share the weights of embedding and head.
        pad_vocab_size_multiple: the embedding has vocab_size rounded up to a multiple of this.
        layer: generation of the layers, ``mamba1`` or ``mamba2`` (SSD, Dao & Gu 2024).
        headdim: inner channels per head (P), which share one step size and one A. Only ``mamba2``.
        ngroups: groups of heads (G), each with its own B and C. Only ``mamba2``.
        chunk_size: tokens that a kernel may treat at once; results depend on it by rounding alone. Only ``mamba2``.
        bias: give the projections into and out of the mixer (``in_proj``, ``out_proj``) a bias each.
        conv_bias: give the causal convolution a bias.
        d_intermediate: channels of a gated MLP behind every mixer, rounded up to a multiple of 128; 0 is no MLP.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int | None = None
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    pad_vocab_size_multiple: int = 8
    layer: str = "mamba1"
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 256
    bias: bool = False
    conv_bias: bool = True
    d_intermediate: int = 0

    def __post_init__(self) -> None:
        if self.layer not in D_STATE:
            raise InputError(f"model.layer must be {' or '.join(D_STATE)}, got {self.layer!r}")
        if self.d_state is None:
            object.__setattr__(self, "d_state", D_STATE[self.layer])
        for key, largest in _LARGEST.items():
            value = getattr(self, key)
            if value is None and key == "dt_rank":
                continue
            least = 0 if key == "d_intermediate" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"model.{key} must be an integer of at least {least}, got {value!r}")
            if value > largest:
                raise InputError(f"model.{key} must be at most {largest}, got {value}")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise InputError(f"model.dt_min must lie in (0, dt_max], got {self.dt_min} with dt_max {self.dt_max}")
        if not (0 < self.dt_init_floor < math.inf and 0 < self.norm_eps < math.inf):
            raise InputError("model.dt_init_floor and model.norm_eps must be above 0 and finite")
        for key in ("tie_embeddings", "bias", "conv_bias"):
            if not isinstance(getattr(self, key), bool):
                raise InputError(f"model.{key} must be true or false, got {getattr(self, key)!r}")
        self._check_generation()

    def _check_generation(self) -> None:
        if self.layer == "mamba2":
            if self.dt_rank is not None:
                raise InputError("model.dt_rank belongs to layer mamba1; mamba2 has one step size per head and no rank")
            if self.d_model % self.width_step:
                raise InputError(
                    f"model.d_model must be a multiple of {self.width_step}, so that expand * d_model splits into "
                    f"ngroups {self.ngroups} x heads of headdim {self.headdim}; got {self.d_model}"
                )
            return
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for key in _ONLY_MAMBA2:
            if getattr(self, key) != defaults[key]:
                raise InputError(f"model.{key} belongs to layer mamba2, not to {self.layer}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        """Heads of a Mamba-2 layer."""
        return self.d_inner // self.headdim

    @property
    def width_step(self) -> int:
        """``d_model`` must be a multiple of this."""
        if self.layer == "mamba1":
            return 1
        group = self.headdim * self.ngroups
        return group // math.gcd(group, self.expand)

    @property
    def d_mlp(self) -> int:
        """Inner channels of the MLP."""
        return -(-self.d_intermediate // _MLP_STEP) * _MLP_STEP

    @property
    def n_additions(self) -> int:
        """How often something is added to the residual stream."""
        return self.n_layer * (2 if self.d_intermediate else 1)

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """Every option; ``d_intermediate`` only where it is set, so that shapes are told as before there was one."""
        values = dataclasses.asdict(self)
        if not self.d_intermediate:
            del values["d_intermediate"]
        return values

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
