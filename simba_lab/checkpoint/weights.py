"""Files of weights: safetensors and torch's own, whole or in shards, mapped into memory."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from simba_lab.errors import InputError

SAFETENSORS_FILE, TORCH_FILE = "model.safetensors", "pytorch_model.bin"
WEIGHTS_FILES = (SAFETENSORS_FILE, TORCH_FILE)
"""What a folder's weights are called; the first that is there is read, whole or by its index of shards."""

LONGEST_NAME = 255
"""Bytes that a file's name may have."""

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def named_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a short name; None stays None. Raises InputError for any other."""
    if name is None or (isinstance(name, torch.dtype) and name in DTYPES.values()):
        return name
    if name not in DTYPES:
        raise InputError(f"dtype: {name!s} is unknown; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def index_file(name: str) -> str:
    """Name of the file that says which shard of ``name`` holds which weight."""
    return f"{name}.index.json"


def read_json(path: Path) -> Any:
    """Raises InputError for a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"checkpoint: {path} is not JSON: {error}") from None


def shard_names(index: Path) -> list[str]:
    """Files that an index names, each beside it. Raises InputError for an index that is none."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    names = list(places.values()) if isinstance(places, Mapping) else []
    if not names or not all(map(_is_file_name, names)):
        raise InputError(f"checkpoint: {index} has no weight_map from weights to files beside it")
    return sorted(set(names))


def _is_file_name(name: Any) -> bool:
    plain = isinstance(name, str) and Path(name).name == name != "" and "\0" not in name
    return plain and len(name.encode("utf-8", "replace")) <= LONGEST_NAME


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder by their names in the file. Raises InputError for what is missing or cannot be read."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return read_file(folder / name)
        if (folder / index_file(name)).is_file():
            return _read_shards(folder / index_file(name))
    raise InputError(f"checkpoint: {folder} holds no {' or '.join(WEIGHTS_FILES)}, whole or in shards with an index")


def _read_shards(index: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in shard_names(index):
        if not (index.parent / name).is_file():
            raise InputError(f"checkpoint: {index.parent} holds no {name}, a shard that {index.name} names")
        weights |= read_file(index.parent / name)
    return weights


def read_file(path: Path) -> dict[str, Tensor]:
    """Weights of one file."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    weights = read_pickle(path)
    if not is_weights(weights):
        raise InputError(f"checkpoint: {path} does not map names to weights")
    return dict(weights)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises InputError for a file that is truncated or something else."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"checkpoint: {path} is truncated or not safetensors: {error}") from None


def read_pickle(path: Path) -> Any:
    """Content of a file of ``torch.save``, its tensors mapped, if it holds nothing but plain data and tensors.

    Raises InputError for one that is truncated, something else, or would execute code.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols of files that are refused anyway
            # Only the zip form, torch's own since 1.6, can be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(f"checkpoint: {path} is not a plain checkpoint; loading it could execute code") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or "it ends too early"
        raise InputError(f"checkpoint: {path} is truncated or not a checkpoint: {reason}") from None


def is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values())
