"""Prefill and decoding as CUDA graphs: every launch of a call recorded once, then replayed without Python in between.

Lengths are static, since they follow from schedule and context length alone, and so is memory: a graph reads its input
from one buffer and leaves its output in others, always the same. Graphs that share memory (``beside``) must not run at
the same time. Weights are read where they lie, but what was derived from them (A) was derived at capture: after a
change of weights, capture again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.model.lm import LanguageModel, Output
from simba_lab.model.mamba import LayerState

CYCLE = 4
"""Decoding steps recorded one after the other. Only the last copies states back to where the first reads them."""


class CapturedPrefill:
    """``model.prefill`` of ``batch`` contexts of ``n_context`` tokens, as one CUDA graph.

    ``beside`` is a captured prefill or decoder whose scratch memory this one shares; any number may share it.
    Raises InputError if the model is not on a CUDA device, or its criterion waits for the device.
    """

    def __init__(
        self, model: LanguageModel, batch: int, n_context: int, beside: CapturedPrefill | CapturedDecoder | None = None
    ) -> None:
        _check(model, batch, n_context)
        self._model, self._beside = model, beside
        self._tokens = torch.zeros(batch, n_context, dtype=torch.int64, device=model.device)
        with _inference(model), frozen_matrices(model) as self._matrices:
            self._graph, self._output = _recorded(lambda: model.prefill(self._tokens), model, _pool(beside))

    @property
    def pool(self) -> tuple[int, int]:
        """Handle of the memory pool."""
        return self._graph.pool()

    def __call__(self, tokens: Tensor) -> Output:
        """Output of ``tokens`` (batch, n_context), from any device.

        Its tensors are overwritten by the next call: ``.clone()`` what has to outlive it. Raises InputError for another
        shape.
        """
        _copy_tokens(tokens, self._tokens, "prefill", "capture another with captured(batch, n_context)")
        self._graph.replay()
        return self._output

    def decoder(self) -> CapturedDecoder:
        """Decoding of as many sequences by the same model, which shares this graph's scratch memory."""
        return CapturedDecoder(self._model, self._tokens.shape[0], beside=self)


class CapturedDecoder:
    """``model.extend`` by one token for ``batch`` sequences, and the greedy choice of the next, as CUDA graphs.

    :meth:`start` it from the states of any prefill, pruned or not; then every :meth:`step` replays one graph.
    ``beside`` and errors as in :class:`CapturedPrefill`.
    """

    def __init__(
        self, model: LanguageModel, batch: int, beside: CapturedPrefill | CapturedDecoder | None = None
    ) -> None:
        _check(model, batch, 1)
        self._model, self._beside, self._turn = model, beside, 0
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._logits: list[Tensor] = []
        pool = _pool(beside)
        with _inference(model), frozen_matrices(model) as self._matrices:
            self._states = [model.prefill(self._tokens).clone().states]
            for turn in range(CYCLE):
                graph, (logits, after) = _recorded(lambda turn=turn: self._advance(turn), model, pool)
                self._graphs.append(graph)
                self._logits.append(logits)
                self._states.append(after)
                pool = graph.pool()

    def _advance(self, turn: int) -> tuple[Tensor, list[LayerState]]:
        logits, after = self._model.extend(self._tokens, self._states[turn])
        if turn == CYCLE - 1:
            torch._foreach_copy_(_tensors(self._states[0]), _tensors(after))
        self._tokens.copy_(logits[:, :, : self._model.config.vocab_size].argmax(-1))
        return logits, after

    @property
    def pool(self) -> tuple[int, int]:
        """Handle of the memory pool."""
        return self._graphs[0].pool()

    @property
    def states(self) -> list[LayerState]:
        """Where decoding is now; overwritten by later steps."""
        return self._states[self._turn]

    @property
    def tokens(self) -> Tensor:
        """Greedy choice (batch, 1) after the last step, which the next one feeds; overwritten by it."""
        return self._tokens

    def start(self, states: list[LayerState], tokens: Tensor) -> None:
        """Go on from ``states``, which are copied, with ``tokens`` (batch, 1) as the first to be fed.

        Raises InputError for states or tokens of another shape.
        """
        given, own = _tensors(states), _tensors(self._states[0])
        if [t.shape for t in given] != [t.shape for t in own]:
            raise InputError(
                f"captured decoder: states must be those of {self._tokens.shape[0]} sequences of this model; "
                "make a CapturedDecoder for another batch"
            )
        self._feed(tokens)
        torch._foreach_copy_(own, given)
        self._turn = 0

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Feed ``tokens`` (batch, 1), by default the greedy choice of the last step: logits (batch, 1, V).

        The logits are overwritten by later steps. Raises InputError for tokens of another shape.
        """
        if tokens is not None:
            self._feed(tokens)
        turn, self._turn = self._turn, (self._turn + 1) % CYCLE
        self._graphs[turn].replay()
        return self._logits[turn]

    def generate(self, states: list[LayerState], tokens: Tensor, n: int) -> Tensor:
        """The ``n`` most likely tokens, one after the other, that follow ``tokens`` (batch, 1) fed to ``states``.

        Returns (batch, n) int64; ids that only pad the vocabulary are never chosen.
        """
        self.start(states, tokens)
        chosen = torch.empty(self._tokens.shape[0], n, dtype=torch.int64, device=self._tokens.device)
        for place in range(n):
            self.step()
            chosen[:, place : place + 1].copy_(self._tokens)
        return chosen

    def _feed(self, tokens: Tensor) -> None:
        _copy_tokens(tokens, self._tokens, "decoder", "it takes one token of each sequence")


def _tensors(states: list[LayerState]) -> list[Tensor]:
    return [t for state in states for t in (state.conv, state.ssm)]


def _check(model: LanguageModel, batch: int, n_context: int) -> None:
    if model.device.type != "cuda":
        raise InputError(f'captured: CUDA graphs need the model on a CUDA device, not on {model.device}: .to("cuda")')
    if batch < 1 or n_context < 1:
        raise InputError(f"captured: batch and n_context must be at least 1, got {batch} and {n_context}")


def _copy_tokens(tokens: Tensor, buffer: Tensor, what: str, hint: str) -> None:
    if tokens.shape != buffer.shape or tokens.is_floating_point():
        got = f"{tuple(tokens.shape)} {tokens.dtype}"
        raise InputError(f"captured {what}: tokens must be integers of shape {tuple(buffer.shape)}, got {got}; {hint}")
    buffer.copy_(tokens, non_blocking=True)


def _pool(beside: CapturedPrefill | CapturedDecoder | None) -> tuple[int, int] | None:
    return None if beside is None else beside.pool


@contextmanager
def frozen_matrices(model: LanguageModel) -> Iterator[list[Tensor]]:
    """Inside, the A of every layer, computed once on entry; yields them, for a graph to keep them alive."""
    mixers = [block.mixer for block in model.backbone.layers]
    with torch.no_grad():
        matrices = [mixer.A for mixer in mixers]
    for mixer, matrix in zip(mixers, matrices, strict=True):
        mixer.frozen_A = matrix
    try:
        yield matrices
    finally:
        for mixer in mixers:
            mixer.frozen_A = None


@contextmanager
def _inference(model: LanguageModel) -> Iterator[None]:
    """No gradients, the model's device, and the autocast of now without its cache: cached casts outlive no capture."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    autocast = torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
    with torch.no_grad(), torch.cuda.device(model.device), autocast:
        yield


def _recorded(body: Callable, model: LanguageModel, pool: tuple[int, int] | None):  # noqa: ANN202 - (graph, result)
    """A graph of what ``body`` launches, and what it returned while it was recorded: the graph's output buffers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()  # compiles kernels and lets libraries allocate
        with _waits_are_errors(model):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = body()
    return graph, result


@contextmanager
def _waits_are_errors(model: LanguageModel) -> Iterator[None]:
    """Raises InputError for a torch operation that makes the host wait for the device, which no graph can hold."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        plan = "the model" if model.pruning is None else f"the model, pruned by {model.pruning.name},"
        raise InputError(
            f"captured: {plan} waits for the device (.item(), bool(tensor), a copy to the host); call it uncaptured"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
