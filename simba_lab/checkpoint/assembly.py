"""From what was read to a model: weights are checked against the config and take their places without a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simba_lab.checkpoint.casting import cast
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import PruningPlan

UNQUESTIONED_LAYERS = 1000
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


def same_name(name: str) -> str:
    return name


@dataclass
class Stored:
    """A model as it lies on disk.

    Args:
        source: file or folder, for messages.
        config: shape.
        weights: by our names.
        plan: how it was pruned, which only our own formats record.
        spelling: our name of a weight -> its name in the file, for messages.
        narrow_residual: its config keeps the residual stream in the dtype of the weights.
    """

    source: str
    config: ModelConfig
    weights: dict[str, Tensor]
    plan: PruningPlan | None = None
    spelling: Callable[[str], str] = same_name
    narrow_residual: bool = False


def assemble(stored: Stored, backend: str, dtype: torch.dtype | None) -> LanguageModel:
    """The model on the CPU in evaluation mode; ``dtype`` None keeps what the file has.

    Raises InputError naming the source and the weight that is missing, surplus or of another shape.
    """
    model = _without_weights(stored, backend)
    if stored.config.tie_embeddings:
        _drop_tied_head(stored)
    _check(model, stored)
    if dtype is not None:
        cast(stored.weights, dtype)
    _check_residual(stored)
    model.load_state_dict(stored.weights, strict=False, assign=True)
    if stored.config.tie_embeddings:
        model.lm_head.weight = model.backbone.embedding.weight
    return model.requires_grad_(True).eval()


def _without_weights(stored: Stored, backend: str) -> LanguageModel:
    """A config of many layers is believed only as far as there are weights: making one takes time, if no memory."""
    layers, weights = stored.config.n_layer, len(stored.weights)
    if layers > UNQUESTIONED_LAYERS + weights:
        raise InputError(f"{stored.source}: the config has {layers} layers, but the file only {weights} weights")
    try:
        with torch.device("meta"):
            return LanguageModel(stored.config, stored.plan, backend, seed=None)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{stored.source}: no model has such a shape: {str(error).partition(chr(10))[0]}") from None


def _drop_tied_head(stored: Stored) -> None:
    """A tied head may be stored again under its own name, but not with other numbers."""
    head, embedding = stored.weights.get(HEAD), stored.weights.get(EMBEDDING)
    if head is None or embedding is None or head.shape != embedding.shape:
        return
    if head.data_ptr() != embedding.data_ptr() and not (head.dtype == embedding.dtype and torch.equal(head, embedding)):
        head_name, embedding_name = stored.spelling(HEAD), stored.spelling(EMBEDDING)
        raise InputError(f"{stored.source}: {head_name} is not {embedding_name}, though the config ties them")
    del stored.weights[HEAD]


def _check(model: LanguageModel, stored: Stored) -> None:
    expected, weights = model.state_dict(), stored.weights
    optional = {HEAD} if stored.config.tie_embeddings else set()
    for key, weight in expected.items():
        if key not in weights and key not in optional:
            raise InputError(f"{stored.source}: the weight {stored.spelling(key)} {tuple(weight.shape)} is missing")
    for key, weight in weights.items():
        named = f"{stored.source}: the weight {stored.spelling(key)}"
        if key not in expected:
            raise InputError(f"{named} {tuple(weight.shape)} is not part of the model")
        if weight.shape != expected[key].shape:
            wanted = tuple(expected[key].shape)
            raise InputError(f"{named} has shape {tuple(weight.shape)}, the model wants {wanted}")
        if not weight.is_floating_point():
            raise InputError(f"{named} is of {weight.dtype}, the model wants floating-point numbers")


def _check_residual(stored: Stored) -> None:
    """Our residual stream is in fp32 at least; to keep it narrower means something only for narrower weights."""
    narrow = {weight.dtype for weight in stored.weights.values() if weight.dtype.itemsize < torch.float32.itemsize}
    if stored.narrow_residual and narrow:
        dtype = str(narrow.pop()).removeprefix("torch.")
        raise InputError(
            f"{stored.source}: residual_in_fp32 false is not supported with weights in {dtype}; load it with dtype fp32"
        )
