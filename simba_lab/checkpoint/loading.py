"""One door for every model on disk or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from simba_lab.checkpoint import hub, state_spaces, transformers_format
from simba_lab.checkpoint.assembly import Stored, assemble
from simba_lab.checkpoint.lightning import read_lightning
from simba_lab.checkpoint.run_folder import SPEC_FILE, read_run_folder
from simba_lab.checkpoint.state_spaces import CONFIG_FILE, read_state_spaces
from simba_lab.checkpoint.transformers_format import read_transformers
from simba_lab.checkpoint.weights import named_dtype, read_json
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.model.shapes import PUBLISHED


def load(path_or_name: str | Path, backend: str = "auto", dtype: str | torch.dtype | None = None) -> LanguageModel:
    """Language model in evaluation mode on the CPU, its weights mapped from the file.

    Args:
        path_or_name: a run folder, a .ckpt, a state-spaces or transformers folder, or a name on the hub, which is
            downloaded unless it is cached.
        backend: kernels to use, see :class:`simba_lab.LanguageModel`.
        dtype: ``fp64``, ``fp32``, ``bf16`` or ``fp16``; None keeps what the file has.

    Raises InputError, in one line, for what is missing, truncated, not supported, or a pickle that would execute code.
    """
    wanted = named_dtype(dtype)
    return assemble(_read(locate(path_or_name)), backend, wanted)


def locate(path_or_name: str | Path) -> Path:
    """The file or folder, downloaded if it is a name on the hub. Raises InputError if there is none."""
    path, text = Path(path_or_name), str(path_or_name)
    if path.exists():
        return path
    if hub.is_name(text):
        return hub.fetch(text)
    meant = f" (did you mean state-spaces/{text}?)" if text in PUBLISHED else ""
    raise InputError(f"checkpoint: {path} does not exist{meant}; give a run folder, a .ckpt file or a converted folder")


def _read(path: Path) -> Stored:
    if path.is_file():
        return read_lightning(path)
    if (path / SPEC_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return read_run_folder(path)
    values = read_json(path / CONFIG_FILE)
    if isinstance(values, Mapping) and transformers_format.MARK in values:
        return read_transformers(path, values)
    if isinstance(values, Mapping) and state_spaces.MARK in values:
        return read_state_spaces(path, values)
    raise InputError(
        f"checkpoint: {path / CONFIG_FILE} has neither {transformers_format.MARK} (transformers) nor "
        f"{state_spaces.MARK} (state-spaces)"
    )


def is_state_spaces(path: Path) -> bool:
    """Whether a folder is one of state-spaces', which come without a tokenizer."""
    if not (path / CONFIG_FILE).is_file():
        return False
    values = read_json(path / CONFIG_FILE)
    return isinstance(values, Mapping) and state_spaces.MARK in values and transformers_format.MARK not in values
