"""Folders of state-spaces' mamba_ssm: ``config.json`` (``MambaConfig``) and ``pytorch_model.bin``, both generations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from simba_lab.checkpoint.assembly import EMBEDDING, HEAD, Stored
from simba_lab.checkpoint.fields import Fields, build, refuse_hybrids, refuse_step_limit, step_rank
from simba_lab.checkpoint.run_folder import plain_weights
from simba_lab.checkpoint.weights import TORCH_FILE, read_weights
from simba_lab.errors import InputError
from simba_lab.files import write_json, writing
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.config import D_STATE

CONFIG_FILE = "config.json"
MARK = "d_model"
"""Key that tells such a config.json from that of transformers."""

_LAYERS = {"Mamba1": "mamba1", "Mamba2": "mamba2"}
_NORM_EPS = 1e-5
"""The norms' own; the config has no key for it."""
_PADDING = 8
# Say how weights were drawn or which kernel runs, not what the model computes.
_NO_MATHEMATICS = """dt_init dt_scale conv_init A_init_range use_fast_path use_mem_eff_path sequence_parallel
process_group""".split()
_SIZES = ("d_state", "d_conv", "expand")
_STEPS = ("dt_min", "dt_max", "dt_init_floor")
_FLAGS = ("bias", "conv_bias")
_ONLY_MAMBA2 = ("headdim", "ngroups", "chunk_size")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


def read_state_spaces(folder: Path, values: dict[str, Any]) -> Stored:
    """``values`` is the folder's config.json. Raises InputError naming a key that is missing or not supported."""
    where = str(folder / CONFIG_FILE)
    config, narrow_residual = _config(Fields(values, where))
    return Stored(str(folder), config, read_weights(folder), narrow_residual=narrow_residual)


def _config(top: Fields) -> tuple[ModelConfig, bool]:
    refuse_hybrids(top)
    narrow_residual = not top.only("residual_in_fp32", True, False)
    top.ignore(["fused_add_norm"])
    ssm = top.section("ssm_cfg")
    layer = _LAYERS[ssm.only("layer", "Mamba1", "Mamba2")]
    keys = _SIZES + _STEPS + _FLAGS + (_ONLY_MAMBA2 if layer == "mamba2" else ())
    options = {key: ssm.take(key, _DEFAULTS[key]) for key in keys}
    options |= {key: top.take(key) for key in ("d_model", "n_layer", "vocab_size")}
    mlp = top.take("d_intermediate", None)
    options["d_intermediate"] = 0 if mlp is None else mlp
    options["tie_embeddings"] = top.take("tie_embeddings", True)
    options["pad_vocab_size_multiple"] = top.take("pad_vocab_size_multiple", _PADDING)
    rank = ssm.take("dt_rank", "auto") if layer == "mamba1" else "auto"
    config = build(top.where, lambda: ModelConfig(layer=layer, **options))
    if layer == "mamba2":
        _refuse_variants(ssm, config)
    ssm.ignore(_NO_MATHEMATICS)
    ssm.finish()
    top.finish()
    rank = step_rank(rank, config.d_model)
    return build(top.where, lambda: dataclasses.replace(config, dt_rank=rank)), narrow_residual


def _refuse_variants(ssm: Fields, config: ModelConfig) -> None:
    ssm.only("d_ssm", None, config.d_inner)
    ssm.only("D_has_hdim", False)
    ssm.only("rmsnorm", True)
    ssm.only("norm_before_gate", False)
    refuse_step_limit(ssm, "dt_limit")


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a shape; options of the layer that are at their defaults are left out, as published.

    Raises InputError for what such a file cannot say.
    """
    if config.norm_eps != _NORM_EPS:
        raise InputError(
            f"model.norm_eps {config.norm_eps} has no place in the format state-spaces, whose norms use {_NORM_EPS}"
        )
    ssm: dict[str, Any] = {"layer": "Mamba2"} if config.layer == "mamba2" else {}
    defaults = _DEFAULTS | {"d_state": D_STATE[config.layer]}
    for key in (*_SIZES, "dt_rank", *_STEPS, *_ONLY_MAMBA2, *_FLAGS):
        if getattr(config, key) != defaults[key]:
            ssm[key] = getattr(config, key)
    return {
        "d_model": config.d_model,
        "d_intermediate": config.d_intermediate,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": config.pad_vocab_size_multiple,
        "tie_embeddings": config.tie_embeddings,
    }


def write_state_spaces(folder: Path, model: LanguageModel) -> None:
    """Write a model, its pruning plan left out; a tied head appears under both its names, as published."""
    write_json(folder / CONFIG_FILE, config_values(model.config))
    weights = plain_weights(model)
    weights.setdefault(HEAD, weights[EMBEDDING])
    with writing(folder / TORCH_FILE) as partial:
        torch.save(weights, partial)
