"""The language model: embedding, Mamba layers with pruning between them, head. Dense is the case of no pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simba_lab.errors import InputError
from simba_lab.kernels import Backend, check_name, resolve
from simba_lab.model.config import ModelConfig
from simba_lab.model.context import Context
from simba_lab.model.cost import Breakdown, forward_flops
from simba_lab.model.mamba import Block, LayerState, Projection, RMSNorm
from simba_lab.model.mixers import make_mixer
from simba_lab.model.mlp import GatedMLP
from simba_lab.pruning import PruningPlan
from simba_lab.registry import Spec

if TYPE_CHECKING:
    from simba_lab.model.captured import CapturedPrefill

HEADS = ("scored", "all")
PROTOCOLS = ("suffix", "full")


@dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    logits (B, n, V); positions (B, n): the original position of each row of logits; kept[l] (B, k_l): the context
    positions that entered layer l, ascending; states: one per layer, from which decoding continues; acausal: True if
    later tokens took part in choosing what earlier predictions see (protocol ``full`` with pruning).
    """

    logits: Tensor
    positions: Tensor
    kept: list[Tensor]
    states: list[LayerState] = field(repr=False)
    acausal: bool = False

    def clone(self) -> Output:
        """A copy that shares no memory with this one."""
        states = [LayerState(state.conv.clone(), state.ssm.clone()) for state in self.states]
        kept = [positions.clone() for positions in self.kept]
        return Output(self.logits.clone(), self.positions.clone(), kept, states, self.acausal)


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, _weight=_empty(config))
        self.layers = nn.ModuleList(_block(config, layer) for layer in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


def _block(config: ModelConfig, layer: int) -> Block:
    return Block(config, make_mixer(config, layer), GatedMLP(config, layer) if config.d_intermediate else None)


def _empty(config: ModelConfig) -> Tensor:
    return torch.empty(config.padded_vocab_size, config.d_model)


class LanguageModel(nn.Module):
    """Mamba language model of either generation, dense or, with a :class:`PruningPlan`, sparse.

    Args:
        config: shape and initialisation.
        pruning: how to prune the context; None is dense.
        backend: kernels to use: ``auto``, ``numba``, ``reference``; resolved at the first call, for the device then.
        seed: of the initial weights; None leaves them unset, for a loader to fill.
    """

    def __init__(
        self, config: ModelConfig, pruning: PruningPlan | None = None, backend: str = "auto", seed: int | None = 0
    ) -> None:
        super().__init__()
        check_name(backend)
        self.config, self.pruning, self.backend_name = config, pruning, backend
        self.backbone = Backbone(config)
        self.lm_head = Projection("head", -1, config.d_model, config.padded_vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        if seed is not None:
            self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        self.backbone.embedding.weight.normal_(std=0.02, generator=generator)
        if not self.config.tie_embeddings:
            self.lm_head.weight.normal_(std=0.02, generator=generator)
        for block in self.backbone.layers:
            block.initialise(self.config, generator)
        self.backbone.norm_f.weight.fill_(1.0)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def backend(self) -> Backend:
        return resolve(self.backend_name, self.device.type)

    def sparsified(
        self,
        criterion: Spec = "global_impact",
        schedule: Spec = "linear",
        mean_keep: float | None = None,
        protect_recent: float = 0.0,
        convolution: str = "compacted",
        **schedule_arguments: Any,
    ) -> LanguageModel:
        """The same weights (shared, not copied), pruned.

        Give the schedule's free parameter by its name (``final_keep=0.10``), or ``mean_keep``, the mean share of the
        context over the layers; the rest is told by :class:`PruningPlan`. Raises InputError for an unknown name or
        option, or a share out of (0, 1].
        """
        plan = PruningPlan.build(
            self.config.n_layer, criterion, schedule, mean_keep, protect_recent, convolution, **schedule_arguments
        )
        return self.with_pruning(plan)

    def with_pruning(self, plan: PruningPlan | None) -> LanguageModel:
        """The same weights with another plan, or dense with None."""
        twin = LanguageModel.__new__(LanguageModel)
        nn.Module.__init__(twin)
        twin.config, twin.pruning, twin.backend_name = self.config, plan, self.backend_name
        twin.backbone, twin.lm_head = self.backbone, self.lm_head
        return twin.train(self.training)

    def keep_counts(self, n_context: int) -> list[int]:
        """Context tokens entering each layer."""
        if self.pruning is None:
            return [n_context] * self.config.n_layer
        return self.pruning.schedule.counts(self.config.n_layer, n_context)

    def flops(self, n_context: int, n_suffix: int, head: str = "scored") -> Breakdown:
        """FLOPs of one sequence, by op and layer; ``head``: logits for the scored positions or all that remain."""
        return forward_flops(self.config, self.keep_counts(n_context), n_suffix, self.pruning, head)

    def forward(
        self, tokens: Tensor, n_context: int | None = None, head: str = "scored", protocol: str = "suffix"
    ) -> Output:
        """Context and suffix in one pass.

        ``tokens`` (B, L) int64: the first ``n_context`` are the context, which is pruned; the rest is the suffix,
        processed densely. ``head="scored"`` gives logits (B, L - n_context + 1, V) for boundary and suffix, ``"all"``
        for every token that reaches the last layer. Without ``n_context`` a dense model gives all L logits.
        ``protocol="full"`` prunes the whole sequence: acausal, and labelled so in the output.

        Raises InputError for lengths that do not fit and for a sparse model without ``n_context``.
        """
        n_context, head = self._arguments(tokens, n_context, head, protocol)
        acausal = protocol == "full" and self.pruning is not None
        hidden, residual, kept, states = self._layers(tokens, n_context)
        n_suffix = tokens.shape[1] - n_context
        suffix = torch.arange(n_context, tokens.shape[1], device=tokens.device).expand(tokens.shape[0], n_suffix)
        positions = torch.cat([kept[-1], suffix], dim=1)
        if head == "scored":
            hidden, residual, positions = (t[:, -n_suffix - 1 :] for t in (hidden, residual, positions))
        return Output(self._head(hidden, residual), positions, kept, states, acausal)

    def _arguments(self, tokens: Tensor, n_context: int | None, head: str, protocol: str) -> tuple[int, str]:
        if protocol not in PROTOCOLS or head not in HEADS:
            raise InputError(f"protocol must be one of {PROTOCOLS} and head one of {HEADS}, got {protocol!r}, {head!r}")
        length = tokens.shape[1]
        if length < 1:
            raise InputError("tokens must hold at least one token per sequence")
        if protocol == "full":
            if n_context is not None:
                raise InputError("n_context does not go with protocol full, which prunes the whole sequence")
            return length, "all"
        if n_context is None:
            if self.pruning is not None:
                raise InputError("n_context is required: a sparse model must know where the context ends")
            return length, "all"
        if not 1 <= n_context <= length:
            raise InputError(f"n_context must lie in 1..{length}, the length of the sequence, got {n_context}")
        return n_context, head

    def _layers(self, tokens: Tensor, n_context: int) -> tuple[Tensor, Tensor, list[Tensor], list[LayerState]]:
        backend, counts = self.backend, self.keep_counts(n_context)
        hidden, residual = self.backbone.embedding(tokens), None
        context = Context(self, tokens, n_context)
        kept, states, going_on = [], [], None
        for layer, block in enumerate(self.backbone.layers):
            kept.append(context.positions)
            prunes = layer + 1 < len(counts) and counts[layer + 1] < counts[layer]
            hidden, residual, state, signals = block(
                hidden, residual, backend, None, context.neighbours(), going_on, context.scored() if prunes else None
            )
            states.append(state)
            going_on = None
            if prunes:
                going_on = context.prune(layer, counts[layer + 1], signals, hidden, residual)
        return hidden, residual, kept, states

    def _head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        normed, _ = self.backbone.norm_f(hidden, residual, self.backend)
        return self.lm_head(normed, self.backend)

    def prefill(self, context: Tensor) -> Output:
        """The context alone (B, T), pruned: logits (B, 1, V) at the boundary and the states to decode from."""
        return self(context, n_context=context.shape[1])

    def captured(self, batch: int, n_context: int, beside: CapturedPrefill | None = None) -> CapturedPrefill:
        """:meth:`prefill` of ``batch`` contexts of ``n_context`` tokens as one CUDA graph, replayed when called.

        Captures for other sizes, made with ``beside=`` the first, share its scratch memory. Raises InputError for a
        model that is not on a CUDA device.
        """
        from simba_lab.model.captured import CapturedPrefill

        return CapturedPrefill(self, batch, n_context, beside)

    def extend(
        self, tokens: Tensor, states: list[LayerState], n_scored: int | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """Suffix tokens (B, n) after ``states``: logits (B, n, V) and the new states. A decoding step is n = 1.

        ``n_scored``, at least 1, gives the logits of the last so many tokens only.
        """
        backend = self.backend
        hidden, residual, after = self.backbone.embedding(tokens), None, []
        for block, state in zip(self.backbone.layers, states, strict=True):
            hidden, residual, state, _ = block(hidden, residual, backend, state)
            after.append(state)
        scored = slice(None if n_scored is None else -n_scored, None)
        return self._head(hidden[:, scored], residual[:, scored]), after
