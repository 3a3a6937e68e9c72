"""Where a fit's weights begin: finished ones from disk instead of those drawn from the seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simba_lab.checkpoint import load
from simba_lab.checkpoint.loading import locate
from simba_lab.checkpoint.tokenizer_file import tokenizer_beside
from simba_lab.checkpoint.weights import WEIGHTS_FILES, index_file, shard_names
from simba_lab.data.tokenizer import Tokenizer
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig

START_KEY = "simba_lab_started_from"
"""Key in a Lightning checkpoint of what :func:`start_from` returned."""
KEY = "model.weights"
WITHOUT_EFFECT = ("dt_min", "dt_max", "dt_init_floor", "chunk_size")
"""What weights were drawn from, which no longer matters once they are there, and what rounding alone depends on."""


def start_from(weights: str, model: LanguageModel, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Copies finished weights into ``model``, whose own dtype stays, and returns what a record says of them.

    That is ``{"weights": weights, "sha256": {file name: digest}}``. How the weights were pruned is not taken over: that
    is what the experiment says.

    Args:
        weights: whatever :func:`simba_lab.load` reads.
        model: of the same shape, vocabulary included.
        tokenizer: of the data; None for data that is not text.

    Raises InputError naming ``model.weights`` for weights that are missing, broken, of another shape, or trained on
    another tokenizer's tokens.
    """
    with _blaming():
        place = locate(weights)
        found = load(place, dtype="fp32")
        _check_shape(weights, found.config, model.config)
        _check_tokenizer(place, tokenizer)
        digests = {path.name: _sha256(path) for path in _files(place)}
    model.load_state_dict(found.state_dict())
    return {"weights": weights, "sha256": digests}


def check_weights(weights: str | None, folder: Path | None) -> None:
    """Before any text is read: raises InputError naming ``model.weights`` if there are none under that name.

    Or if they are those of ``folder``, the run folder of a fit, which its own weights would take the place of.
    """
    if weights is None:
        return
    with _blaming():
        place = locate(weights)
        if folder is not None and place.resolve() == folder.resolve():
            raise InputError(f"{weights} is the run folder of this fit; change trainer.default_root_dir")


@contextmanager
def _blaming() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{KEY}: {str(error).removeprefix('checkpoint: ')}") from None


def _check_shape(weights: str, found: ModelConfig, wanted: ModelConfig) -> None:
    theirs, ours = (dataclasses.asdict(config) | {"dt_rank": config.rank} for config in (found, wanted))
    for key, value in ours.items():
        if key not in WITHOUT_EFFECT and theirs[key] != value:
            asked = "the data's tokenizer has" if key == "vocab_size" else "model.model asks for"
            raise InputError(f"{weights} has {key} {theirs[key]}, {asked} {value}")


def _check_tokenizer(place: Path, tokenizer: Tokenizer | None) -> None:
    beside = tokenizer_beside(place)
    if beside is None or tokenizer is None:
        return
    if Tokenizer.load(beside).fingerprint() != tokenizer.fingerprint():
        raise InputError(f"{beside} is not the data's tokenizer; give data.tokenizer {beside}, or weights of this one")


def _files(place: Path) -> list[Path]:
    """The files that weights were read from."""
    if place.is_file():
        return [place]
    for name in WEIGHTS_FILES:
        if (place / name).is_file():
            return [place / name]
        if (place / index_file(name)).is_file():
            return [place / shard for shard in shard_names(place / index_file(name))]
    raise InputError(f"{place} holds no weights")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
