"""From any format that is read to any that is written, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from simba_lab.checkpoint.card import RECORD, write_card
from simba_lab.checkpoint.hub import NEOX, TOKENIZER_FILE
from simba_lab.checkpoint.loading import is_state_spaces, load, locate
from simba_lab.checkpoint.run_folder import save_model
from simba_lab.checkpoint.state_spaces import write_state_spaces
from simba_lab.checkpoint.tokenizer_file import tokenizer_beside
from simba_lab.checkpoint.transformers_format import write_transformers
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel

FORMATS: dict[str, Callable[[Path, LanguageModel], None]] = {
    "run": save_model,
    "state-spaces": write_state_spaces,
    "transformers": write_transformers,
}
_ALSO = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Small files that go along with a tokenizer, where they are."""


def convert(
    source: str | Path, target: str | Path, format: str, dtype: str | torch.dtype | None = None, card: bool = False
) -> dict[str, Any]:
    """Write the model ``source`` (whatever :func:`load` takes) as a new folder ``target``; weights keep every bit.

    ``format`` is one of ``FORMATS``; ``dtype`` as for :func:`load`. A run stays one: in format ``run`` its record goes
    along, and with ``card`` a page made from it. Returns what was written, and remarks on what the format has no place
    for. Raises InputError for a target that exists, a model that the format cannot express, or no record for a card.
    """
    if format not in FORMATS:
        raise InputError(f"format: {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if card and format != "run":
        raise InputError(f"card: only a run has a record to make it from, and format {format} no place for it; use run")
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists; name a new folder, nothing is overwritten")
    place = locate(source)
    model = load(place, dtype=dtype)
    with _appearing(target) as folder:
        FORMATS[format](folder, model)
        tokenizer = _copy_tokenizer(place, folder)
        if format == "run":
            _copy(RECORD, place, folder)
        if card:
            write_card(folder, model, target.name)
    parameters = sum(weight.numel() for weight in model.parameters())
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
    return {
        "source": str(source),
        "target": str(target),
        "format": format,
        "files": sorted(path.name for path in target.iterdir()),
        "parameters": parameters,
        "dtypes": dtypes,
        "remarks": _remarks(model, format, place, tokenizer),
    }


def _remarks(model: LanguageModel, format: str, place: Path, tokenizer: bool) -> list[str]:
    remarks = []
    if model.pruning is not None and format != "run":
        remarks.append(f"the pruning plan stays behind: the format {format} has no place for it")
    if not tokenizer:
        right = f"; state-spaces' models use that of {NEOX}" if is_state_spaces(place) else ""
        remarks.append(f"no {TOKENIZER_FILE} beside the source to copy{right}")
    return remarks


def _copy_tokenizer(place: Path, folder: Path) -> bool:
    tokenizer = tokenizer_beside(place)
    if tokenizer is None:
        return False
    _copy((TOKENIZER_FILE, *_ALSO), tokenizer.parent, folder)
    return True


def _copy(names: Iterable[str], source: Path, folder: Path) -> None:
    """The files of these names that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when all is written, and is gone if anything fails."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except (OSError, SafetensorError) as error:  # a full disk, a folder that may not be written to
        raise InputError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
