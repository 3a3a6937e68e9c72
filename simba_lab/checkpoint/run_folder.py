"""Our run folder: ``model.json`` (the spec) and ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from simba_lab.checkpoint.assembly import HEAD, Stored
from simba_lab.checkpoint.spec import model_spec, read_spec
from simba_lab.checkpoint.weights import SAFETENSORS_FILE, read_json, read_safetensors
from simba_lab.errors import InputError
from simba_lab.files import write_json, writing
from simba_lab.model import LanguageModel

SPEC_FILE = "model.json"


def save_model(folder: Path, model: LanguageModel, weights: dict[str, Tensor] | None = None) -> None:
    """Write spec and weights into ``folder``, each whole or not at all. A tied head is stored once.

    ``weights`` by name, where this process has only a part of the model's own.
    """
    write_safetensors(folder / SAFETENSORS_FILE, plain_weights(model, weights))
    write_json(folder / SPEC_FILE, model_spec(model))


def plain_weights(model: LanguageModel, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Weights by name on the CPU, a tied head left out; the model's own unless given."""
    named = model.state_dict() if weights is None else weights
    weights = {name: weight.detach().cpu().contiguous() for name, weight in named.items()}
    if model.config.tie_embeddings:
        del weights[HEAD]
    return weights


def write_safetensors(path: Path, weights: dict[str, Tensor]) -> None:
    with writing(path) as partial:
        save_file(weights, partial, metadata={"format": "pt"})


def read_run_folder(folder: Path) -> Stored:
    """Raises InputError for what is missing, truncated or not ours."""
    for name in (SPEC_FILE, SAFETENSORS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"checkpoint: {folder} holds no {name}; a run folder of `simba-lab fit` has one")
    spec = read_json(folder / SPEC_FILE)
    weights = read_safetensors(folder / SAFETENSORS_FILE)
    config, plan = read_spec(spec, str(folder))
    return Stored(str(folder), config, weights, plan)
