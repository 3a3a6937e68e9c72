"""NaN and infinity stop a run at once: the step, the layer in which they first appear, and what is still good."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from simba_lab.errors import NotFinite
from simba_lab.model import LanguageModel
from simba_lab.model.lm import Output
from simba_lab.pruning import Criterion, ScoredShape, Signals
from simba_lab.pruning.criteria import checked_scores
from simba_lab.pruning.measure import check_measured
from simba_lab.training.sharding import sharded


class FiniteGuard(Callback):
    """Stops a fit at the first loss that is not finite. Raises NotFinite.

    On the CPU that is before the loss has changed a weight. On CUDA the first bad step is noted on the device and
    looked at where the host waits for the device anyway, every ``log_every_n_steps`` steps: looking at every loss would
    hold back the next step's launch. Weights that are not finite are never saved.
    """

    def __init__(self) -> None:
        self._batch: dict[str, Tensor] | None = None
        self._first_bad: Tensor | None = None  # () int64 on the device: a step, or -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        if loss.device.type != "cuda":
            good = bool(torch.isfinite(loss).all())
            self._stop_unless(trainer, pl_module, good, trainer.global_step)
            return
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss).all() & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Before the file is written: a checkpoint that is not finite must not take the place of one that is."""
        name = first_bad_weight(pl_module.lm)
        if trainer.world_size > 1 and not trainer.strategy.reduce_boolean_decision(name is None, all=True):
            name = name or "of another process"
        if name is not None:
            self._stop(trainer, f"the weight {name} is not finite after step {trainer.global_step}")

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if self._first_bad is not None:
            step = int(self._first_bad)
            self._stop_unless(trainer, module, step < 0, step)

    def _stop_unless(self, trainer: Trainer, module: LightningModule, good: bool, step: int) -> None:
        if trainer.world_size > 1:  # all processes stop together, or those that go on would wait for the others
            good = trainer.strategy.reduce_boolean_decision(good, all=True)
        if not good:
            place = "the weights are divided" if sharded(trainer) else diagnosis(module.step.loss, self._batch)
            which = f"step {step}" if step >= 0 else "a step of another process"
            self._stop(trainer, f"the loss of {which} is not finite: {place}")

    def _stop(self, trainer: Trainer, what: str) -> None:
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = f"{last} is good" if last.is_file() else "there is no checkpoint yet"
        raise NotFinite(f"{what}; {kept}; lower model.learning_rate or raise trainer.precision")


def first_bad_weight(model: nn.Module) -> str | None:
    """Name of the first parameter that holds NaN or infinity; one wait for the device in all."""
    named = list(model.named_parameters())
    if not named:
        return None
    bad = torch.stack([~torch.isfinite(weight.detach()).all() for _, weight in named]).tolist()
    return next((name for (name, _), is_bad in zip(named, bad, strict=True) if is_bad), None)


@torch.no_grad()
def diagnosis(loss: nn.Module, batch: dict[str, Tensor]) -> str:
    """Where a forward pass first leaves the finite numbers: one more pass, eager, every module's output looked at."""
    name = first_bad_weight(loss)
    if name is not None:
        return f"the weight {name} is not finite"
    found: list[str] = []
    with _watching(loss, found):
        value = loss(batch["tokens"], batch["labels"])
    if found:
        return f"the output of {found[0]} is the first that is not finite"
    if torch.isfinite(value).all():
        return "a second pass over its batch is finite"
    return "logits are finite, their cross entropy is not"


@contextmanager
def _watching(module: nn.Module, found: list[str]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if not all(torch.isfinite(tensor).all() for tensor in _tensors(output)):
                found.append(name)

        return look

    handles = [inner.register_forward_hook(hook(name)) for name, inner in module.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a module's output: itself, in a tuple, or in a record such as a layer's state."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))


class _Watched(Criterion):
    """A criterion, and whether its scores were finite, layer by layer, without waiting for the device."""

    def __init__(self, inner: Criterion) -> None:
        self.inner, self.op = inner, inner.op
        self.bad: dict[int, Tensor] = {}
        self.measured: set[ScoredShape] = set()

    def score(self, signals: Signals) -> Tensor:
        if self.inner.op is None and signals.shape not in self.measured:
            self.measured.add(signals.shape)
            scores = check_measured(self.inner, signals)
        else:
            scores = checked_scores(self.inner, signals)
        self.bad[signals.layer] = ~torch.isfinite(scores).all()
        return scores

    def flops(self, shape: ScoredShape) -> int:
        return self.inner.flops(shape)


class FiniteWatch:
    """A model under evaluation whose scores and states are looked at once per batch.

    Args:
        model: what is evaluated; ``watched`` is the same weights, to be called in its place.
    """

    def __init__(self, model: LanguageModel) -> None:
        plan = model.pruning
        self._criterion = None if plan is None else _Watched(plan.criterion)
        watched = plan and dataclasses.replace(plan, criterion=self._criterion)
        self.watched = model.with_pruning(watched)

    def check(self, out: Output, where: str) -> None:
        """Raises NotFinite naming the layer and ``where`` if a score, a state or a logit of ``out`` is not finite."""
        bad = {}
        for layer, state in enumerate(out.states):
            if self._criterion is not None and layer in self._criterion.bad:
                bad[f"a score of layer {layer}"] = self._criterion.bad.pop(layer)
            bad[f"a state of layer {layer}"] = ~(torch.isfinite(state.conv).all() & torch.isfinite(state.ssm).all())
        bad["a logit"] = ~torch.isfinite(out.logits).all()
        flags = torch.stack(list(bad.values())).tolist()
        for what, is_bad in zip(bad, flags, strict=True):
            if is_bad:
                raise NotFinite(f"{what} is not finite in {where}")
