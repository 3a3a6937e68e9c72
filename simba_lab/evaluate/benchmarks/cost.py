"""What requests of the harness cost an arm, by the closed form: the same in any batch, without padding."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from simba_lab.evaluate.benchmarks.scores import Cost
from simba_lab.evaluate.scoring import Pair
from simba_lab.model import LanguageModel


def cost_of_pairs(model: LanguageModel, pairs: Sequence[Pair], requests: int) -> Cost:
    """Prefill of every distinct context, once, and after it every continuation but its last token, which is not fed.

    The head is charged for the boundary and for every continuation token that is fed.
    """
    contexts = {pair.context.tobytes(): len(pair.context) for pair in pairs}
    fed = sum(len(pair.continuation) - 1 for pair in pairs)
    lengths = list(contexts.values())
    flops = sum(prefill_flops(model, lengths)) + fed * per_suffix_token(model)
    return Cost(flops, requests, len(lengths), kept_by_layer(model, lengths))


def cost_of_texts(model: LanguageModel, lengths: Sequence[int]) -> Cost:
    """Prefill of every prompt of these lengths; each token written after it comes on top (:func:`per_suffix_token`)."""
    return Cost(sum(prefill_flops(model, lengths)), len(lengths), len(lengths), kept_by_layer(model, lengths))


def prefill_flops(model: LanguageModel, lengths: Iterable[int]) -> list[int]:
    """FLOPs of each context length, its boundary's logits included."""
    one = functools.cache(lambda length: model.flops(length, 0).total)
    return [one(length) for length in lengths]


def kept_by_layer(model: LanguageModel, lengths: Sequence[int]) -> list[float]:
    """Mean context tokens that enter each layer; nothing for no contexts."""
    if not lengths:
        return []
    distinct, counts = np.unique(lengths, return_counts=True)
    kept = np.array([model.keep_counts(int(length)) for length in distinct], dtype=np.float64)
    return np.average(kept, axis=0, weights=counts).tolist()


def per_suffix_token(model: LanguageModel) -> int:
    """Suffix tokens are dense: each costs the same after any context."""
    return model.flops(1, 1).total - model.flops(1, 0).total
