"""The LightningModule: loss, optimiser and what is logged. The model itself is in ``simba_lab.model``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric, SumMetric

from simba_lab.checkpoint import SPEC_KEY, model_spec
from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import PruningPlan
from simba_lab.training.graphs import Step
from simba_lab.training.loss import IGNORED, TokenLoss
from simba_lab.training.sharding import clip_by_norm, plain_name, sharded
from simba_lab.training.start import START_KEY, start_from

LEDGER_KEY = "simba_lab_ledger"
FREE_MATRICES = ("A_log", "embedding.weight", "lm_head.weight")
"""Parameters of two dimensions that weight decay leaves alone."""


class PartSpec:
    """class_path + init_args of a criterion or schedule, left alone by the config parser.

    The parser would take such a mapping for a class of its own to build, and knows no registry names.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec.as_dict() if isinstance(spec, Namespace) else spec


@dataclass(frozen=True)
class PrunedTraining:
    """Training with pruning on: the loss is taken on the suffix only (protocol ``suffix``).

    Args:
        n_context: tokens that may be pruned; the rest of every window is the suffix.
        criterion: registry name, class path, or class_path + init_args.
        schedule: likewise.
        mean_keep: mean share of the context over the layers; null if the schedule's own parameter is given.
        protect_recent: share of the kept tokens that are the newest.
        convolution: compacted reads whatever stands beside a token now, adjacent its true neighbours only.
    """

    n_context: int
    criterion: str | PartSpec = "global_impact"
    schedule: str | PartSpec = "linear"
    mean_keep: float | None = None
    protect_recent: float = 0.0
    convolution: str = "compacted"


class LanguageModeling(LightningModule):
    """Next-token training of a dense or pruned language model.

    Args:
        model: shape and initialisation of the model.
        pruning: train with pruning on; null trains dense on every position.
        weights: finished weights to start from, cast to fp32: a run folder, a .ckpt, or whatever else simba_lab.load
            reads, of the same shape and tokenizer; null draws them from the seed.
        backend: kernels, by name, or auto.
        seed: of the initial weights; null is 0, on the command line seed_everything.
        learning_rate: peak of AdamW's learning rate.
        weight_decay: on matrices; none on biases, norms, embeddings, A and D.
        betas: AdamW's two.
        warmup_steps: steps of linear rise to the peak.
        final_lr_share: share of the peak at which the cosine ends.
        cuda_graphs: ``auto`` replays the training step as a CUDA graph where that is possible, ``off`` never does; the
            numbers are the same.
    """

    def __init__(
        self,
        model: ModelConfig,
        pruning: PrunedTraining | None = None,
        weights: str | None = None,
        backend: str = "auto",
        seed: int | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 100,
        final_lr_share: float = 0.1,
        cuda_graphs: str = "auto",
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or weight_decay < 0 or warmup_steps < 0 or not 0 <= final_lr_share <= 1:
            raise InputError(
                "model: learning_rate must be above 0, weight_decay and warmup_steps at least 0, "
                "final_lr_share in [0, 1]"
            )
        self.pruned, self.learning_rate, self.weight_decay, self.betas = pruning, learning_rate, weight_decay, betas
        self.warmup_steps, self.final_lr_share = warmup_steps, final_lr_share
        plan = None
        if pruning is not None:
            criterion, schedule = (
                part.spec if isinstance(part, PartSpec) else part for part in (pruning.criterion, pruning.schedule)
            )
            plan = PruningPlan.build(
                model.n_layer, criterion, schedule, pruning.mean_keep, pruning.protect_recent, pruning.convolution
            )
            plan.schedule.counts(model.n_layer, pruning.n_context)
        self.lm = LanguageModel(model, plan, backend, seed or 0)
        self.weights = weights
        self.started_from: dict[str, Any] | None = None
        # Told from shapes, which a strategy that divides the weights among processes changes.
        self.parameter_count = sum(parameter.numel() for parameter in self.lm.parameters())
        named = self.lm.named_parameters()
        self._decayed = {name for name, weight in named if weight.dim() >= 2 and not name.endswith(FREE_MATRICES)}
        self.ledger = Ledger()
        self.tokens_seen = 0
        self.step = Step(TokenLoss(self.lm, pruning.n_context if pruning else None), self.ledger, cuda_graphs)
        # Exact per split: sums over all scored tokens, not means of batch means.
        self.nll, self.accuracy = MeanMetric(), MeanMetric()
        self.nll_sum, self.byte_sum = (SumMetric().set_dtype(torch.float64) for _ in range(2))

    def setup(self, stage: str) -> None:
        """Puts finished weights in place, once; a checkpoint to resume from comes after them.

        Raises InputError if they do not fit or the data's windows are shorter than the context, before anything is
        written.
        """
        data = self.trainer.datamodule
        length = getattr(data, "length", None)
        if self.pruned is not None and length is not None and self.pruned.n_context > length:
            raise InputError(
                f"model.pruning.n_context: {self.pruned.n_context} is longer than data.length, "
                f"a window of {length} tokens"
            )
        if self.weights is not None and self.started_from is None:
            self.started_from = start_from(self.weights, self.lm, getattr(data, "tokenizer", None))

    def scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (n, V) and labels (n,) of all positions if dense, else of boundary and suffix.

        Labels of ``IGNORED`` stand among them.
        """
        return self.step.loss.scored(batch["tokens"], batch["labels"])

    def on_train_start(self) -> None:
        self.step.begin(self.trainer)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = self.step.forward(batch["tokens"], batch["labels"])
        self.tokens_seen += batch["tokens"].numel() * self.trainer.world_size
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        self.step.backward(lambda: loss.backward(*args, **options))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning, which under autocast refuses a fused optimiser: fused ones undo fp16's loss scaling themselves.

        Where nothing is scaled nothing stands in the way, and the fused optimiser is never built where it is. Nor does
        Lightning clip by the norm of gradients that are divided among processes.
        """
        if gradient_clip_val and sharded(self.trainer) and gradient_clip_algorithm in (None, "norm"):
            clip_by_norm(self.trainer, gradient_clip_val)
            return
        if not any(group.get("fused") for group in optimizer.param_groups):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_train_end(self) -> None:
        self.step.forget()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._measure(batch)

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._measure(batch)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """Negative log-likelihood in nats, and whether the label was the most likely token, of each scored position."""
        logits, labels = self.scored(batch)
        logits = logits.float()
        nll = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        scored, correct = labels != IGNORED, logits.argmax(-1) == labels
        return {"nll": nll[scored], "correct": correct[scored], "labels": labels[scored]}

    def _measure(self, batch: dict[str, Tensor]) -> None:
        measured = self.predict_step(batch, 0)
        self.nll.update(measured["nll"])
        self.accuracy.update(measured["correct"].float())
        self.nll_sum.update(measured["nll"].double().sum())
        self.byte_sum.update(self._token_bytes(measured["labels"]).sum())

    def _token_bytes(self, labels: Tensor) -> Tensor:
        """UTF-8 bytes of each label; zeros where the data is not text."""
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)
        if tokenizer is None:
            return torch.zeros_like(labels)
        return torch.as_tensor(tokenizer.token_bytes(), device=labels.device)[labels]

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        """Logs loss (nats per token), accuracy and, for text, bits per byte; then forgets."""
        values = {"loss": self.nll.compute(), "accuracy": self.accuracy.compute()}
        if self.byte_sum.compute() > 0:
            values["bits_per_byte"] = self.nll_sum.compute() / (self.byte_sum.compute() * math.log(2))
        for name, value in values.items():
            self.log(f"{split}/{name}", value.float(), prog_bar=name == "loss")
        for metric in (self.nll, self.accuracy, self.nll_sum, self.byte_sum):
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decayed, free = [], []
        for name, parameter in self.lm.named_parameters():
            (decayed if plain_name(name) in self._decayed else free).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": free, "weight_decay": 0.0}]
        fused = True if self._can_fuse() else None
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=fused)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _can_fuse(self) -> bool:
        """One kernel for the whole update: on CUDA, unless fp16's loss scaling would have to be undone before it."""
        return self.device.type == "cuda" and getattr(self.trainer.precision_plugin, "scaler", None) is None

    def _lr_share(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        total = max(1, self.trainer.estimated_stepping_batches - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / total)
        return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SPEC_KEY] = model_spec(self.lm)
        checkpoint[START_KEY] = self.started_from
        checkpoint[LEDGER_KEY] = {"entries": list(self.ledger.entries.items()), "tokens": self.tokens_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get(SPEC_KEY) != model_spec(self.lm):
            raise InputError("ckpt_path: the checkpoint holds another model than the config describes")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._check_start(checkpoint.get(START_KEY))
        saved = checkpoint[LEDGER_KEY]
        self.ledger.entries.clear()
        self.ledger.entries.update(dict(saved["entries"]))
        self.tokens_seen = saved["tokens"]

    def _check_start(self, saved: dict[str, Any] | None) -> None:
        """A fit goes on only from where it began, so that its config and its record stay true."""
        began, given = (start and start["sha256"] for start in (saved, self.started_from))
        if began != given:
            source = "the seed" if saved is None else f"{saved['weights']} as it was then"
            raise InputError(f"ckpt_path: the checkpoint's fit began from {source}, model.weights says otherwise")
