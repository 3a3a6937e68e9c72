"""The tokenizer that belongs to a model on disk."""

from __future__ import annotations

from pathlib import Path

from simba_lab.checkpoint import hub
from simba_lab.checkpoint.hub import NEOX, TOKENIZER_FILE
from simba_lab.checkpoint.loading import is_state_spaces, locate
from simba_lab.errors import InputError


def tokenizer_path(path_or_name: str | Path) -> Path:
    """The tokenizer beside a model, in a run folder above it, or on the hub for a name.

    Raises InputError if there is none.
    """
    path, text = Path(path_or_name), str(path_or_name)
    if beside := tokenizer_beside(path):
        return beside
    named = not path.exists() and hub.is_name(text)
    folder = locate(text) if named else path
    if named and (beside := tokenizer_beside(folder)):
        return beside
    if named and is_state_spaces(folder):
        return hub.fetch_tokenizer(text)
    missing = f"tokenizer: no {TOKENIZER_FILE} beside {path}"
    if is_state_spaces(folder):
        raise InputError(f"{missing}; state-spaces' models use that of {NEOX}: copy it there")
    raise InputError(f"{missing}; a run folder of `simba-lab fit` on text has one")


def tokenizer_beside(path: Path) -> Path | None:
    """The tokenizer in a folder or, for a checkpoint of a run, in the run's folder above it."""
    places = (folder / TOKENIZER_FILE for folder in [path, *path.parents][:3])
    return next((place for place in places if place.is_file()), None)
