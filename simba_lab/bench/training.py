"""Training: tokens per second of whole steps, ours through Lightning's Trainer, mamba-ssm's model in a plain loop."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from simba_lab.bench import models
from simba_lab.bench.floors import floor_of_sequence
from simba_lab.bench.lines import Line, Target, or_reason, throughput
from simba_lab.bench.model_work import training_work
from simba_lab.bench.ops import missing, peer_name
from simba_lab.bench.session import Session
from simba_lab.bench.timing import Timing, free_memory
from simba_lab.model import ModelConfig
from simba_lab.training.module import LanguageModeling, PartSpec, PrunedTraining

# Steps before the clock starts (compilation, the allocator), steps in one stretch between two readings of it.
WARMUP, STRETCH, STRETCHES = 8, 5, 5
STEPS = WARMUP + STRETCH * STRETCHES
_BATCHES = 4
# Of a window, the context.
_CONTEXT = 7 / 8
_LEARNING_RATE = 1e-3
# Layers from one cut of the schedule to the next, and what convolutions read, of the pruned lines.
_PRUNED = ((1, "compacted"), (4, "compacted"), (1, "adjacent"))


@dataclass(frozen=True)
class TrainingCase:
    """A model and ``batch`` windows of ``length`` tokens; ``deterministic``: also what bit-equal runs cost."""

    config: ModelConfig
    batch: int
    length: int
    dense: Target = Target(1.5)
    promise: Target = Target(0.9)
    deterministic: bool = False

    @property
    def what(self) -> str:
        c = self.config
        return f"d {c.d_model}, {c.n_layer} layers, {self.batch} x {self.length}, vocabulary {c.vocab_size}"

    @property
    def context(self) -> int:
        """Tokens that pruned training may thin out; its loss is taken on the rest."""
        return int(_CONTEXT * self.length)


CASES = {
    "256": TrainingCase(ModelConfig(256, 8, 512), 64, 512),
    "384": TrainingCase(ModelConfig(384, 12, 4096), 64, 512),
    "512": TrainingCase(ModelConfig(512, 12, 16384), 32, 1024),
    "768": TrainingCase(ModelConfig(768, 24, 50277), 16, 2048),
}


class StretchClock(Callback):
    """Seconds of every stretch of steps after the warm-up; works as a callback of Lightning and called by hand."""

    more = 0

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self.readings, self.loss = device, 0, [], float("nan")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self.tick(outputs["loss"])

    def tick(self, loss: Tensor) -> None:
        """A step has been queued; at the end of a stretch wait for the device and read the clock."""
        self.steps += 1
        if self.steps >= WARMUP and (self.steps - WARMUP) % STRETCH == 0:
            self.loss = float(loss.detach())  # waits for everything before it
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.readings.append(time.perf_counter())

    def timing(self) -> Timing:
        """Milliseconds of a step."""
        pairs = zip(self.readings, self.readings[1:], strict=False)
        return Timing.of([1e3 * (after - before) / STRETCH for before, after in pairs])


def measure_training(case: TrainingCase, session: Session) -> Iterator[Line]:
    """Dense beside mamba-ssm; dense with the loss of pruned training, and pruned beside what FLOPs promise over that.

    A loss on the suffix alone spares most of the head, whatever is pruned: that is not what pruning gains.
    """
    tokens, batches = case.batch * case.length, batches_of(case, session.seed)
    dense, loss = train_ours(case, batches, session, None)
    reason = missing("mamba_ssm.models.mixer_seq_simple", "mamba-ssm")
    theirs = reason or or_reason("mamba-ssm", lambda: _peer(case, batches, session.device))
    least = floor_of_sequence(training_work(case.config, case.batch, case.length), session.ceilings)
    line = throughput(f"training, {case.what}, dense", tokens, dense, peer_name("mamba-ssm"), theirs, case.dense, least)
    yield replace(line, note=line.note or f"loss {loss:.2f} after {STEPS} steps on random tokens")
    alike, _ = train_ours(case, batches, session, dense_alike(case))
    what = f"training, {case.what}, dense, loss on the last {case.length - case.context} tokens"
    yield throughput(what, tokens, alike, "the loss on all", dense)
    for every, convolution in _PRUNED:
        yield _pruned_line(case, batches, session, alike, every, convolution)
    if case.deterministic:
        same_bits, _ = train_ours(case, batches, session, None, deterministic=True)
        yield throughput(f"training, {case.what}, dense, deterministic", tokens, same_bits, "as it is", dense)


def _pruned_line(
    case: TrainingCase, batches: list[dict[str, Tensor]], session: Session, dense: Timing, every: int, convolution: str
) -> Line:
    """Pruned to 10 % at the top, every so many layers; ``dense`` has the same loss."""
    pruning = pruned_linearly(case, every, convolution)
    pruned, _ = train_ours(case, batches, session, pruning)
    promised, speedup = promised_speedup(case, pruning), dense.median / pruned.median
    tokens = case.batch * case.length
    what = f"training, {case.what}, pruned linearly to 10% by global impact"
    what += "" if every == 1 else f", every {every} layers"
    what += "" if convolution == "compacted" else f", convolution {convolution}"
    return Line(
        what, unit="tokens/s",
        ours=1e3 * tokens / pruned.median, spread=(1e3 * tokens / pruned.high, 1e3 * tokens / pruned.low),
        figure=speedup / promised, figure_kind="promise", target=case.promise,
        note=f"{speedup:.2f}x our dense with this loss, FLOPs promise {promised:.2f}x",
    )  # fmt: skip


def dense_alike(case: TrainingCase) -> PrunedTraining:
    """Nothing pruned, and the loss of pruned training."""
    return PrunedTraining(case.context, "recency", "uniform", mean_keep=1.0)


def pruned_linearly(case: TrainingCase, every: int, convolution: str) -> PrunedTraining:
    """To 10 % at the top by global impact, cut every so many layers."""
    schedule = PartSpec({"class_path": "linear", "init_args": {"final_keep": 0.1, "every": every}})
    return PrunedTraining(case.context, "global_impact", schedule, convolution=convolution)


def promised_speedup(case: TrainingCase, pruning: PrunedTraining) -> float:
    """FLOPs of the dense model with the same loss over those of the pruned one."""
    with torch.device("meta"):
        module = LanguageModeling(case.config, pruning)
        sizes = case.context, case.length - case.context
        return module.lm.with_pruning(None).flops(*sizes).total / module.lm.flops(*sizes).total


def train_ours(
    case: TrainingCase, batches: list[dict[str, Tensor]], session: Session, pruning: PrunedTraining | None,
    deterministic: bool = False, clock: StretchClock | None = None,
) -> tuple[Timing, float]:  # fmt: skip
    """Time of a step under Lightning's Trainer, as ``simba-lab fit`` runs it but for loggers and checkpoints.

    A ``clock`` may want ``more`` steps than those it times.
    """
    free_memory()
    clock = StretchClock(session.device) if clock is None else clock
    steps = STEPS + clock.more
    options = {"backend": session.backend, "seed": session.seed, "learning_rate": _LEARNING_RATE}
    module = LanguageModeling(case.config, pruning, **options)
    accelerator = "gpu" if session.device.type == "cuda" else "cpu"
    with warnings.catch_warnings(), _determinism_restored():
        warnings.simplefilter("ignore")  # advice about loader workers, loggers and batch sizes
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        trainer = Trainer(
            accelerator=accelerator, devices=1, precision="bf16-mixed", max_steps=steps,
            callbacks=[clock], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, deterministic=deterministic,
        )  # fmt: skip
        trainer.fit(module, DataLoader(_endless(batches, steps), batch_size=None))
    return clock.timing(), clock.loss


@contextmanager
def _determinism_restored() -> Iterator[None]:
    """Lightning sets it for the whole process."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _peer(case: TrainingCase, batches: list[dict[str, Tensor]], device: torch.device) -> Timing:
    """Time of a step of mamba-ssm's model in a plain loop: bf16 autocast, fused AdamW."""
    free_memory()
    model = models.mamba_ssm(case.config, device, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, fused=device.type == "cuda")
    clock = StretchClock(device)
    for batch in _endless(batches, STEPS):
        tokens, labels = (batch[name].to(device, non_blocking=True) for name in ("tokens", "labels"))
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.tick(loss)
    return clock.timing()


def _endless(batches: list[dict[str, Tensor]], steps: int) -> list[dict[str, Tensor]]:
    return [batches[step % len(batches)] for step in range(steps)]


def batches_of(case: TrainingCase, seed: int) -> list[dict[str, Tensor]]:
    """Random windows in host memory, pinned where there is a GPU, each token labelled with the next."""
    windows = []
    for number in range(_BATCHES):
        generator = torch.Generator().manual_seed(seed + number)
        text = torch.randint(case.config.vocab_size, (case.batch, case.length + 1), generator=generator)
        window = {"tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous()}
        windows.append({n: t.pin_memory() for n, t in window.items()} if torch.cuda.is_available() else window)
    return windows
