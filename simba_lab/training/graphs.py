"""The training step as a CUDA graph: forward and backward pass of a batch in one launch instead of thousands.

A small Mamba leaves an H200 waiting for Python most of the time. The lengths of a step are fixed, those of a pruned one
too (they follow from schedule and window length), so its launches are captured once and replayed. Gradient clipping,
optimiser and logging stay outside, as Lightning runs them, and so does the exchange of gradients under ``ddp``, which
then follows the backward pass.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.training import exchange
from simba_lab.training.loss import TokenLoss

MODES = ("auto", "off")
CAPTURABLE_BACKENDS = ("triton",)
WITHOUT = "training steps run without CUDA graphs"

_log = logging.getLogger(__name__)


def refusal(mode: str, trainer: Trainer, backend: str) -> str | None:
    """Why steps of this fit run eagerly, or None if they can be captured."""
    device = trainer.strategy.root_device.type
    if mode == "off":
        return "model.cuda_graphs is off"
    if device != "cuda":
        return f"the device is {device}"
    if (reason := exchange.refusal(trainer.strategy)) is not None:
        return reason
    if trainer.accumulate_grad_batches != 1 or any(
        isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks
    ):
        return "gradients are accumulated over batches"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the loss is scaled for fp16"
    if torch.is_anomaly_enabled():
        return "trainer.detect_anomaly reads every gradient"
    if backend not in CAPTURABLE_BACKENDS:
        return f"backend {backend} is not made for it"
    return None


class Step:
    """Forward and backward pass of training: eager, or captured at the second batch and replayed from then on.

    The first batch runs eagerly: it compiles the kernels, shows whether anything waits for the device, and is charged
    to the ledger op by op; a replay, in which no Python runs, is charged the same. A batch of another shape than the
    first runs eagerly. Not an ``nn.Module``, so that the weights keep one name in checkpoints.

    Args:
        loss: the forward pass.
        ledger: is charged for all processes what this one runs; every process runs the same shapes.
        mode: ``auto`` or ``off``. Raises InputError for anything else.
    """

    def __init__(self, loss: TokenLoss, ledger: Ledger, mode: str) -> None:
        if mode not in MODES:
            raise InputError(f"model.cuda_graphs must be one of {', '.join(MODES)}, got {mode!r}")
        self.loss, self.ledger, self.mode = loss, ledger, mode
        self.reason: str | None = "training has not begun"
        self._processes = 1
        self._running = Ledger()
        self._exchange: exchange.Exchange | None = None
        self.forget()

    def forget(self) -> None:
        """Frees the graph and its memory, and leaves the exchange of gradients to Lightning."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = None
        self._graph: _Graph | None = None
        self._shape: torch.Size | None = None
        self._cost: Counter | None = None
        self._replayed = self._warned = False

    def begin(self, trainer: Trainer) -> None:
        """Decides for the fit of ``trainer`` whether its steps are captured, and logs why not."""
        self.forget()
        self._processes = trainer.world_size
        self.reason = refusal(self.mode, trainer, self.loss.lm.backend.name)
        if self.reason is not None:
            expected = self.mode != "off" and trainer.strategy.root_device.type == "cuda"
            _log.log(logging.WARNING if expected else logging.INFO, "%s: %s", WITHOUT, self.reason)
        elif isinstance(trainer.strategy, DDPStrategy):
            self._exchange = exchange.Exchange(trainer.strategy.model)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of ``tokens`` and ``labels`` (B, L) int64."""
        self._replayed = False
        if self.reason is not None:
            return self._eager(tokens, labels)
        if self._shape is None:
            self._shape = tokens.shape
            return self._rehearse(tokens, labels)
        if tokens.shape != self._shape or self._cost is None:
            return self._other_shape(tokens, labels)
        if self._graph is None:
            self._graph = _capture(self.loss, tokens, labels, self._exchange is not None)
        self._replayed = True
        return self._graph.replay(tokens, labels)

    def backward(self, eager: Callable[[], None]) -> None:
        """Gradients of the last loss into ``.grad``: those of the replay, or by ``eager``; then charges the step.

        Of several processes one may replay while another does not: how they exchange gradients is the same.
        """
        if self._replayed:
            self._graph.hand_out_gradients()
            self._charge(self._cost)
        else:
            eager()
            self._charge(self._measured())
        if self._exchange is not None:
            self._exchange.average()

    def _measured(self) -> Counter:
        """What the eager step cost; the first one tells the cost of every replay."""
        cost = Counter(self._running.entries)
        self._running.entries.clear()
        if self._shape is not None and self._cost is None:
            self._cost = cost
        return cost

    def _charge(self, cost: Counter) -> None:
        for entry, flops in cost.items():
            self.ledger.entries[entry] += flops * self._processes

    def _eager(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self._running.entries.clear()
        with recording(self._running):
            return self.loss(tokens, labels)

    def _rehearse(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The first step, in which a wait for the device, which cannot be captured, is an error."""
        try:
            with _waiting_is_an_error():
                return self._eager(tokens, labels)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
        self.reason = "the forward pass waits for the device, probably in a criterion"
        _log.warning("%s: %s", WITHOUT, self.reason)
        return self._eager(tokens, labels)

    def _other_shape(self, tokens: Tensor, labels: Tensor) -> Tensor:
        if not self._warned:
            _log.warning(
                "a batch of shape %s runs without the CUDA graph, which is for %s", (*tokens.shape,), (*self._shape,)
            )
            self._warned = True
        return self._eager(tokens, labels)


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """Inside, a torch operation that makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature.*")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _Graph:
    """Captured launches, and the memory they read from and write to."""

    def __init__(self, loss: TokenLoss, tokens: Tensor, labels: Tensor, shared: bool) -> None:
        self.tokens, self.labels = tokens.clone(), labels.clone()
        self.parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
        self.graph = torch.cuda.CUDAGraph()
        run = _differentiated(loss, self.parameters)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(self.tokens, self.labels)
        torch.cuda.current_stream().wait_stream(side)
        # Among several processes a thread of NCCL's watches over what was sent, which must not spoil the capture.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local" if shared else "global"):
            self.loss, self.gradients = run(self.tokens, self.labels)

    def replay(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss.clone()

    def hand_out_gradients(self) -> None:
        for parameter, gradient in zip(self.parameters.values(), self.gradients, strict=True):
            parameter.grad = gradient


def _capture(loss: TokenLoss, tokens: Tensor, labels: Tensor, shared: bool) -> _Graph:
    torch.cuda.empty_cache()  # what the first step left is of no use to the graph, whose memory is its own
    try:
        return _Graph(loss, tokens, labels, shared)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"model.cuda_graphs: the step cannot be captured ({why}); set it to off") from error


def _differentiated(
    loss: TokenLoss, parameters: dict[str, Tensor]
) -> Callable[[Tensor, Tensor], tuple[Tensor, tuple[Tensor | None, ...]]]:
    """A function to (loss, gradients), the forward pass under the autocast of now, the backward pass under none.

    It differentiates by leaves of its own that share the parameters' memory: a parameter's own node in the autograd
    graph may be bound to another stream, which would then be drawn into the capture. Casts are not cached: a cast made
    before the capture would never be made again.
    """
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

    def run(tokens: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        with torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False):
            value = torch.func.functional_call(loss, leaves, (tokens, labels))
        with torch.autocast("cuda", enabled=False):
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        laid_out = map(_like, gradients, leaves.values())
        return value.detach(), tuple(laid_out)

    return run


def _like(gradient: Tensor | None, leaf: Tensor) -> Tensor | None:
    """The gradient in the memory layout of its parameter, as autograd would store it."""
    if gradient is None or gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf).copy_(gradient)
