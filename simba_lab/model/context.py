"""The context of one pass as it gets shorter: which tokens are left, and what a criterion is told about them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simba_lab.kernels.cost import Ledger, charge, is_recording, recording, select
from simba_lab.model.cost import look_ahead_flops, scoring_flops
from simba_lab.model.mamba import Kept, MixerSignals, Scored
from simba_lab.pruning.criteria import checked_scores
from simba_lab.pruning.hashing import sequence_key
from simba_lab.pruning.measure import stated_cost
from simba_lab.pruning.select import protected_count, select_tokens
from simba_lab.pruning.signals import LookAhead, Signals

if TYPE_CHECKING:
    from simba_lab.model.lm import LanguageModel


class Context:
    """The first ``n_context`` of ``tokens`` (B, L) int64, on their way through the layers of ``model``.

    ``positions`` (B, k) int64: the original places, ascending, of the tokens that are left.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, n_context: int) -> None:
        self._model, self._n_context, self._n_suffix = model, n_context, tokens.shape[1] - n_context
        self._key = functools.cache(lambda: sequence_key(tokens[:, :n_context]))
        self.positions = torch.arange(n_context, device=tokens.device).expand(len(tokens), n_context)

    def neighbours(self) -> Tensor | None:
        """Tokens (B, k + suffix) directly before each in the text that are left, as far as the convolution reads.

        None while no token is missing, and in a model that convolves whatever is left.
        """
        return self._neighbours(self.positions, self._n_suffix)

    def _neighbours(self, positions: Tensor, n_suffix: int) -> Tensor | None:
        plan, whole = self._model.pruning, positions.shape[1] == self._n_context
        if plan is None or plan.convolution == "compacted" or whole:
            return None
        return self._model.backend.true_neighbours(positions, self._n_context, n_suffix, self._model.config.d_conv)

    def scored(self) -> Scored | None:
        """What the layer that is pruned after may find on its way; None if the criterion reads no such thing."""
        impact = self._model.pruning.criterion.own_impact
        return None if impact is None else Scored(self.positions.shape[1], impact)

    def prune(self, layer: int, k: int, mixer: MixerSignals, hidden: Tensor, residual: Tensor) -> Kept:
        """Keeps the k tokens that the criterion ranks highest after ``layer``; what they are among those it had.

        ``hidden`` and ``residual`` (B, present + suffix, d_model): what the layer adds to the residual stream, and the
        stream it adds it to.
        """
        plan, config, before = self._model.pruning, self._model.config, self.positions
        batch, present = before.shape
        with torch.no_grad():
            stream, flops = functools.partial(_stream, hidden, residual, present), look_ahead_flops(config, 1)
            ahead = LookAhead(functools.partial(self._ahead, before), config.n_layer, flops, config.d_conv)
            n_free = present - protected_count(k, plan.protect_recent)
            signals = self._signals(before, layer, mixer, stream, ahead, n_free)
            scores = checked_scores(plan.criterion, signals)
            chosen, self.positions = select_tokens(self._model.backend, scores, before, k, plan.protect_recent)
        if is_recording():  # the cost of a user's criterion is measured, which takes time
            charge(layer, "score", batch * scoring_flops(config, plan, present, k))
            charge(layer, "select", batch * select(present))
        return Kept(chosen, present)

    def _signals(
        self, positions: Tensor, layer: int, mixer: MixerSignals, stream: Callable[[], Tensor],
        ahead: LookAhead | None = None, n_free: int | None = None,
    ) -> Signals:  # fmt: skip
        block, present = self._model.backbone.layers[layer].mixer, positions.shape[1]
        context = {
            name: value[:, :present].detach() if isinstance(value, Tensor) else value
            for name, value in vars(mixer).items()
        }
        return Signals(
            layer=layer, backend=self._model.backend, dt_bias=block.dt_bias, A=block.A, hidden=stream,
            positions=positions, sequence_key=self._key, channel_norms=lambda: block.channel_norms, ahead=ahead,
            n_free=n_free, **context,
        )  # fmt: skip

    def _ahead(self, positions: Tensor, layer: int, stream: Tensor, tokens: slice = slice(None)) -> Signals:
        """What ``layer`` would compute for the tokens at ``positions`` from their ``stream`` (B, k, d_model) as it is.

        ``tokens``: those whose stream it is, if not all. A criterion's own work: it is charged as scoring, and not as
        that layer's.
        """
        model, backend, positions = self._model, self._model.backend, positions[:, tokens]
        block = model.backbone.layers[layer]
        cost = len(stream) * look_ahead_flops(model.config, positions.shape[1])
        with recording(Ledger()), stated_cost(cost):
            normed, _ = block.norm(stream.to(model.backbone.embedding.weight.dtype), None, backend)
            mixer = block.mixer.ungated(normed, backend, self._neighbours(positions, 0))
            return self._signals(positions, layer, mixer, lambda: stream)


def _stream(hidden: Tensor, residual: Tensor, present: int) -> Tensor:
    """The residual stream of the context after a layer, whose own contribution ``hidden`` the next one would add."""
    return hidden[:, :present] + residual[:, :present]
