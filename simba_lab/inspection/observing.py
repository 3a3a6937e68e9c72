"""Looking at a model while it runs, from outside: what each layer saw, and how each token was scored.

Nothing here changes what a model computes, except :func:`bypassed`, and that only inside its ``with`` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simba_lab.model import LanguageModel
from simba_lab.model.mamba import MixerSignals
from simba_lab.pruning import Criterion, Signals
from simba_lab.pruning.criteria import checked_scores

Watch = Callable[[int, Tensor, MixerSignals], None]
"""Told, for each layer: its number, the residual stream at its input (B, L, M), and its mixer's signals."""


class Remembering(Criterion):
    """Scores as ``inner`` does and keeps the scores: ``seen[l]`` (B, k_l), of the tokens present in layer l."""

    def __init__(self, inner: Criterion) -> None:
        self.inner = inner
        self.seen: dict[int, Tensor] = {}

    def score(self, signals: Signals) -> Tensor:
        scores = self.seen[signals.layer] = checked_scores(self.inner, signals)
        return scores


@contextmanager
def watched(model: LanguageModel, watch: Watch) -> Iterator[None]:
    """Inside, every layer that runs is reported to ``watch``."""

    def reporter(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def report(block: nn.Module, arguments: Any, output: Any) -> None:
            _, residual, _, signals = output
            watch(layer, residual, signals)

        return report

    blocks = model.backbone.layers
    handles = [block.register_forward_hook(reporter(layer)) for layer, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(model: LanguageModel, layer: int, kept: Tensor, n_context: int) -> Iterator[None]:
    """Inside, context tokens that are not in ``kept`` (B, k) go around ``layer`` (1 or above), and only that one.

    The layer runs on the kept tokens and the suffix as in a pruned model; to the residual stream of a token that goes
    around it adds nothing. All other layers see every token.
    """
    block, given = model.backbone.layers[layer], []

    def gather(block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, residual, backend, *state = arguments
        given.append((hidden, residual))
        return *backend.keep_tokens(hidden, residual, kept, n_context), backend, *state

    def scatter(block: nn.Module, arguments: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        added, _, *rest = output
        hidden, residual = given.pop()
        suffix = torch.arange(n_context, hidden.shape[1], device=kept.device).expand(len(kept), -1)
        index = torch.cat([kept, suffix], dim=1)[:, :, None].expand(-1, -1, hidden.shape[2])
        return torch.zeros_like(hidden).scatter(1, index, added), residual + hidden.to(residual.dtype), *rest

    handles = [block.register_forward_pre_hook(gather), block.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
