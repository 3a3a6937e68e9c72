"""What each arm drops from one passage: the layer each token is dropped before, its scores, what the suffix loses."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.arms import parse_arm
from simba_lab.inspection.groups import View, views
from simba_lab.inspection.observing import Remembering
from simba_lab.inspection.passage import Passage
from simba_lab.inspection.pieces import kinds_by_token, pieces
from simba_lab.model import LanguageModel, Output

Say = Callable[[str], None]


def parse_arms(names: Sequence[str], model: LanguageModel) -> list[tuple[str, LanguageModel]]:
    """(name, model) of each arm, doubles left out. Raises InputError as :func:`parse_arm` does."""
    arms = []
    for name in dict.fromkeys(names):
        try:
            arms.append((name, parse_arm(name, model)))
        except InputError as error:
            raise InputError(f"--arms: {name}: {str(error).removeprefix('arms: ')}") from None
    return arms


def inspect_tokens(
    arms: Sequence[tuple[str, LanguageModel]], passage: Passage, tokenizer: Tokenizer, say: Say
) -> dict[str, Any]:
    """The shown window, token by token, and what every arm does with it, as plain data.

    ``tokens``: ``id``, ``text`` of runs of tokens that hold whole characters, ``run`` (tokens in each run), ``kind``,
    ``count`` (occurrences in the window's context), one entry per token unless said otherwise. ``views``: the groups.
    ``dense_suffix_nll``: nats per suffix token. ``arms``: see :func:`inspect_arm`.
    """
    ids, n_context = passage.shown, passage.n_context
    runs = pieces(tokenizer.spellings(ids))
    kinds = kinds_by_token(runs)
    grouped = views(ids[:n_context], kinds[:n_context], passage.training_counts)
    occurrences = Counter(ids[:n_context])
    return {
        "source": passage.source,
        "notes": passage.notes,
        "n_context": n_context,
        "n_suffix": passage.n_suffix,
        "tokens": {
            "id": ids,
            "run": [count for count, _ in runs],
            "text": [text for _, text in runs],
            "kind": kinds,
            "count": [occurrences[token] for token in ids],
            "training_count": passage.training_counts,
        },
        "views": [view.plain() for view in grouped],
        "dense_suffix_nll": _suffix_nll(arms[0][1].with_pruning(None), passage)[0].tolist(),
        "arms": [inspect_arm(name, arm, passage, grouped, say) for name, arm in arms],
    }


@torch.no_grad()
def inspect_arm(name: str, arm: LanguageModel, passage: Passage, grouped: Sequence[View], say: Say) -> dict[str, Any]:
    """One arm's way with the shown window.

    ``keep_counts`` per layer; ``dropped_before`` per context token: the first layer it does not enter, None if it
    enters all; ``scores``: {layer: one per context token that enters it, in order}, of the layers that are scored;
    ``suffix_nll`` (nats) per suffix token; ``kept``: {view: (groups, layers) shares}.
    """
    say(name)
    heard, scores = _remembering(arm)
    nll, out = _suffix_nll(heard, passage)
    dropped = dropped_before([positions[0].tolist() for positions in out.kept], passage.n_context)
    return {
        "name": name,
        "keep_counts": [positions.shape[1] for positions in out.kept],
        "flops": arm.flops(passage.n_context, passage.n_suffix).total,
        "dropped_before": dropped,
        "scores": {str(layer): of_tokens[0].double().tolist() for layer, of_tokens in scores.items()},
        "suffix_nll": nll.tolist(),
        "kept": {view.key: view.kept(dropped, len(out.kept)) for view in grouped},
    }


@torch.no_grad()
def _suffix_nll(model: LanguageModel, passage: Passage) -> tuple[Tensor, Output]:
    """NLL (n_suffix,) of the shown window's suffix, nats, fp64, and the output it is from."""
    tokens = passage.windows[:1].to(model.device)
    out = model(tokens, n_context=passage.n_context)
    labels = tokens[0, passage.n_context :]
    return F.cross_entropy(out.logits[0, :-1].double(), labels, reduction="none"), out


def _remembering(arm: LanguageModel) -> tuple[LanguageModel, dict[int, Tensor]]:
    """The same arm, and the scores (1, k_l) by layer, there once it has run."""
    if arm.pruning is None:
        return arm, {}
    criterion = Remembering(arm.pruning.criterion)
    return arm.with_pruning(dataclasses.replace(arm.pruning, criterion=criterion)), criterion.seen


def dropped_before(kept: Sequence[Sequence[int]], n_context: int) -> list[int | None]:
    """For every context position the first layer whose ``kept`` positions lack it; None if no layer does."""
    first: list[int | None] = [None] * n_context
    for layer in reversed(range(len(kept))):
        for position in set(range(n_context)).difference(kept[layer]):
            first[position] = layer
    return first
