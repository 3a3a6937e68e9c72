"""Saving and loading models without Lightning: a plain-dict spec that rebuilds the module, and its weights.

A run folder holds ``model.json`` (the spec) and ``model.safetensors``; a Lightning checkpoint carries the same spec
under ``SPEC_KEY``. Nothing that could execute code is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.files import write_json, writing
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import PruningPlan

SPEC_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "model.json", "model.safetensors", "tokenizer.json"
SPEC_KEY = "simba_lab_model"
FORMAT = 1


def model_spec(model: LanguageModel) -> dict[str, Any]:
    """Plain data from which :func:`model_from_spec` rebuilds the module, weights aside."""
    pruning = None if model.pruning is None else model.pruning.spec()
    return {"format": FORMAT, "model": model.config.to_dict(), "pruning": pruning}


def model_from_spec(spec: Any, source: str, weights: Mapping[str, Tensor], backend: str) -> LanguageModel:
    """Model of a spec with the given weights. Raises InputError naming the source and the key that does not fit."""
    if not isinstance(spec, Mapping) or spec.get("format") != FORMAT or not isinstance(spec.get("model"), Mapping):
        raise InputError(f"{source}: not a simba_lab model spec of format {FORMAT}")
    try:
        config = ModelConfig.from_dict(spec["model"])
        plan = None if spec.get("pruning") is None else PruningPlan.from_spec(spec["pruning"])
    except (InputError, TypeError) as error:
        raise InputError(f"{source}: {error}") from None
    with torch.device("meta"):
        model = LanguageModel(config, plan, backend, seed=None)
    _check_weights(model, weights, source)
    model.load_state_dict(dict(weights), strict=False, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    return model.requires_grad_(True).eval()


def _check_weights(model: LanguageModel, weights: Mapping[str, Tensor], source: str) -> None:
    expected = model.state_dict()
    optional = {"lm_head.weight"} if model.config.tie_embeddings else set()
    for key in expected.keys() - weights.keys() - optional:
        raise InputError(f"{source}: the weight {key} {tuple(expected[key].shape)} is missing")
    for key, weight in weights.items():
        if key not in expected:
            raise InputError(f"{source}: the weight {key} {tuple(weight.shape)} is not part of the model")
        if weight.shape != expected[key].shape:
            wanted = tuple(expected[key].shape)
            raise InputError(f"{source}: the weight {key} has shape {tuple(weight.shape)}, the model wants {wanted}")


def save_model(folder: Path, model: LanguageModel) -> None:
    """Write spec and weights into ``folder``, each whole or not at all. A tied head is stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    with writing(folder / WEIGHTS_FILE) as partial:
        save_file(weights, partial)
    write_json(folder / SPEC_FILE, model_spec(model))


def load(path: str | Path, backend: str = "auto") -> LanguageModel:
    """Language model from a run folder or a Lightning checkpoint (.ckpt), in evaluation mode on the CPU.

    Raises InputError, in one line, for what is missing, truncated, not ours, or a pickle that would execute code.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, backend)
    if path.is_file():
        return _load_lightning(path, backend)
    raise InputError(f"checkpoint: {path} does not exist; give a run folder or a .ckpt file")


def _load_folder(folder: Path, backend: str) -> LanguageModel:
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"checkpoint: {folder} holds no {name}; a run folder of `simba-lab fit` has one")
    try:
        spec = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"checkpoint: {folder / SPEC_FILE} is not JSON: {error}") from None
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise InputError(f"checkpoint: {folder / WEIGHTS_FILE} is truncated or not safetensors: {error}") from None
    return model_from_spec(spec, str(folder), weights, backend)


def _load_lightning(path: Path, backend: str) -> LanguageModel:
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols of files that are refused anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint: {path} is not a plain checkpoint; loading it could execute code") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise InputError(f"checkpoint: {path} is truncated or not a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or SPEC_KEY not in checkpoint or not _is_weights(checkpoint.get("state_dict")):
        raise InputError(f"checkpoint: {path} was not written by simba_lab: it has no {SPEC_KEY} with weights")
    weights = {key.removeprefix("lm."): value for key, value in checkpoint["state_dict"].items()}
    return model_from_spec(checkpoint[SPEC_KEY], str(path), weights, backend)


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values())


def tokenizer_path(path: str | Path) -> Path:
    """The tokenizer that belongs to a run folder or to a checkpoint inside one.

    Raises InputError if there is none.
    """
    path = Path(path)
    for folder in [path, *path.parents][:3]:
        if (folder / TOKENIZER_FILE).is_file():
            return folder / TOKENIZER_FILE
    raise InputError(f"tokenizer: no {TOKENIZER_FILE} beside {path}; a run folder of `simba-lab fit` on text has one")
