"""Folders of transformers: ``MambaForCausalLM`` and ``Mamba2ForCausalLM``, config.json and safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from simba_lab.checkpoint.assembly import EMBEDDING, Stored
from simba_lab.checkpoint.fields import Fields, build, refuse_hybrids, refuse_step_limit, step_rank
from simba_lab.checkpoint.run_folder import plain_weights, write_safetensors
from simba_lab.checkpoint.state_spaces import CONFIG_FILE
from simba_lab.checkpoint.weights import SAFETENSORS_FILE, read_weights
from simba_lab.errors import InputError
from simba_lab.files import write_json
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import NEOX_VOCABULARY

MARK = "model_type"
"""Key that every config.json of transformers has."""

_LAYERS = {"mamba": "mamba1", "mamba2": "mamba2"}
_CLASSES = {"mamba1": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
_TABLE = "backbone.embeddings.weight"
"""What transformers calls the embedding; every other weight has state-spaces' name."""

# Our option -> (their key, the default of MambaConfig, of Mamba2Config); a saved config may leave defaults out.
_OPTIONS: dict[str, tuple[str, Any, Any]] = {
    "d_model": ("hidden_size", 768, 4096),
    "n_layer": ("num_hidden_layers", 32, 64),
    "vocab_size": ("vocab_size", 50280, 32768),
    "d_state": ("state_size", 16, 128),
    "d_conv": ("conv_kernel", 4, 4),
    "expand": ("expand", 2, 2),
    "dt_min": ("time_step_min", 0.001, 0.001),
    "dt_max": ("time_step_max", 0.1, 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4, 1e-4),
    "norm_eps": ("layer_norm_epsilon", 1e-5, 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True, False),
    "bias": ("use_bias", False, False),
    "conv_bias": ("use_conv_bias", True, True),
}
_MAMBA2_OPTIONS = {"headdim": ("head_dim", 64), "ngroups": ("n_groups", 8), "chunk_size": ("chunk_size", 256)}
_MULTIPLE, _UNPADDED = "pad_vocab_size_multiple", "unpadded_vocab_size"
"""Keys beside transformers' own, which counts padding as vocabulary; the first is state-spaces'."""


def read_transformers(folder: Path, values: dict[str, Any]) -> Stored:
    """``values`` is the folder's config.json. Raises InputError naming a key that is not supported."""
    fields = Fields(values, str(folder / CONFIG_FILE))
    layer = _LAYERS[fields.only(MARK, *_LAYERS)]
    fields.only("architectures", [_CLASSES[layer]], None)
    fields.only("quantization_config", None)
    fields.only("hidden_act", "silu", "swish")
    refuse_hybrids(fields)
    narrow_residual = not fields.only("residual_in_fp32", True, False)
    config = _mamba1(fields) if layer == "mamba1" else _mamba2(fields)
    weights = {_ours(name): weight for name, weight in read_weights(folder).items()}
    return Stored(str(folder), _unpadded(config, fields), weights, None, _theirs, narrow_residual)


def _ours(name: str) -> str:
    return EMBEDDING if name == _TABLE else name


def _theirs(name: str) -> str:
    return _TABLE if name == EMBEDDING else name


def _mamba1(fields: Fields) -> ModelConfig:
    options = {ours: fields.take(key, default) for ours, (key, default, _) in _OPTIONS.items()}
    rank = step_rank(fields.take("time_step_rank", "auto"), options["d_model"])
    return build(fields.where, lambda: ModelConfig(**options, dt_rank=rank, pad_vocab_size_multiple=1))


def _mamba2(fields: Fields) -> ModelConfig:
    """``norm_before_gate``, which some published folders set, is not read: neither does Mamba2ForCausalLM."""
    options = {ours: fields.take(key, default) for ours, (key, _, default) in _OPTIONS.items()}
    options |= {ours: fields.take(key, default) for ours, (key, default) in _MAMBA2_OPTIONS.items()}
    refuse_step_limit(fields, "time_step_limit")
    config = build(fields.where, lambda: ModelConfig(**options, layer="mamba2", pad_vocab_size_multiple=1))
    if (heads := fields.take("num_heads", 128)) != config.nheads:
        fields.refuse("num_heads", heads, f"{config.nheads}, expand x hidden_size / head_dim,")
    return config


def _unpadded(config: ModelConfig, fields: Fields) -> ModelConfig:
    """The config with the vocabulary as it was before padding, where the file says so and is not out of date."""
    multiple, unpadded = fields.take(_MULTIPLE, 1), fields.take(_UNPADDED, config.vocab_size)
    try:
        told = dataclasses.replace(config, vocab_size=unpadded, pad_vocab_size_multiple=multiple)
    except InputError:
        return config
    return told if told.padded_vocab_size == config.vocab_size else config


def config_values(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a shape whose weights are of ``dtype``. Raises InputError for what it cannot say."""
    if config.d_intermediate:
        raise InputError(
            f"model.d_intermediate {config.d_intermediate} has no place in the format transformers, whose layers have "
            "no MLP; use state-spaces or run"
        )
    first = config.layer == "mamba1"
    values: dict[str, Any] = {"architectures": [_CLASSES[config.layer]], MARK: "mamba" if first else "mamba2"}
    values |= {key: getattr(config, ours) for ours, (key, *_) in _OPTIONS.items()}
    values |= {"hidden_act": "silu", "residual_in_fp32": True, "torch_dtype": dtype}
    if first:
        values["time_step_rank"] = config.rank
    else:
        values |= {key: getattr(config, ours) for ours, (key, _) in _MAMBA2_OPTIONS.items()}
        values["num_heads"] = config.nheads
    values |= {"vocab_size": config.padded_vocab_size, _MULTIPLE: config.pad_vocab_size_multiple}
    values[_UNPADDED] = config.vocab_size
    # Token 0 of the GPT-NeoX tokenizer ends a text; of any other vocabulary the model does not know.
    ends = 0 if config.vocab_size == NEOX_VOCABULARY else None
    return values | {"bos_token_id": ends, "eos_token_id": ends, "pad_token_id": ends}


def write_transformers(folder: Path, model: LanguageModel) -> None:
    """Write a model, its pruning plan left out."""
    weights = plain_weights(model)
    table = weights.pop(EMBEDDING)
    write_safetensors(folder / SAFETENSORS_FILE, {_TABLE: table} | weights)
    write_json(folder / CONFIG_FILE, config_values(model.config, str(table.dtype).removeprefix("torch.")))
