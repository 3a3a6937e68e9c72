"""Training steps as CUDA graphs: the same numbers as eager steps, and a reason wherever steps stay eager.

What a capture records, gradients by leaves that share the parameters' memory, and the bookkeeping around it run on
every machine; the capture itself needs a GPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from simba_lab.data import RecallData
from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger
from simba_lab.model import ModelConfig
from simba_lab.pruning import Criterion, ScoredShape, Signals
from simba_lab.training import LanguageModeling, PrunedTraining, graphs
from simba_lab.training.graphs import Step, refusal
from simba_lab.training.loss import TokenLoss

SHAPE = {"d_model": 24, "n_layer": 3, "vocab_size": 41, "d_state": 4}
N_CONTEXT, LENGTH, BATCH = 20, 32, 4
PRUNINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "pruned": {"n_context": N_CONTEXT, "mean_keep": 0.6},
    "random": {"n_context": N_CONTEXT, "criterion": "random", "mean_keep": 0.6},
    "blocks": {
        "n_context": N_CONTEXT, "criterion": {"class_path": "blocks", "init_args": {"size": 4}}, "schedule": "uniform",
        "mean_keep": 0.6, "convolution": "adjacent",
    },
}  # fmt: skip
every_arm = pytest.mark.parametrize("arm", list(PRUNINGS))


def module(arm: str = "dense", shape: Mapping[str, Any] | None = None, **options: Any) -> LanguageModeling:
    pruning = PRUNINGS[arm]
    plan = None if pruning is None else PrunedTraining(**pruning)
    return LanguageModeling(ModelConfig(**SHAPE | dict(shape or {})), plan, warmup_steps=2, **options)


def batches(count: int, length: int = LENGTH) -> list[tuple[Tensor, Tensor]]:
    stream = torch.randint(1, 41, (count, BATCH, length + 1), generator=torch.Generator().manual_seed(3))
    labels = stream[..., 1:].clone()
    labels[..., ::7] = -100
    return list(zip(stream[..., :-1], labels, strict=True))


def gradients(made: LanguageModeling) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in made.lm.named_parameters()}
    made.zero_grad(set_to_none=True)
    return found


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@every_arm
@pytest.mark.parametrize("tied", [True, False])
def test_leaves_of_their_own_get_the_gradients_of_the_parameters(arm: str, tied: bool) -> None:
    made = module(arm, {"tie_embeddings": tied})
    ((tokens, labels),) = batches(1)
    parameters = dict(made.step.loss.named_parameters())
    loss, found = graphs._differentiated(made.step.loss, parameters)(tokens, labels)
    assert all(parameter.grad is None for parameter in parameters.values()) and not loss.requires_grad
    assert all(g.stride() == p.stride() for g, p in zip(found, parameters.values(), strict=True))
    eager = made.step.loss(tokens, labels)
    eager.backward()
    assert torch.equal(loss, eager.detach())
    assert_same(dict(zip(parameters, found, strict=True)), {f"lm.{name}": g for name, g in gradients(made).items()})


def test_frozen_parameters_get_no_gradient() -> None:
    made = module()
    made.lm.backbone.layers[0].requires_grad_(False)
    wanted = {name: p for name, p in made.step.loss.named_parameters() if p.requires_grad}
    _, found = graphs._differentiated(made.step.loss, wanted)(*batches(1)[0])
    assert len(found) == len(wanted) < len(list(made.lm.parameters())) and all(g is not None for g in found)


class Uncaptured:
    """In the place of a graph: computes what a capture would have recorded, at every replay."""

    made = 0

    def __init__(self, loss: TokenLoss, tokens: Tensor, labels: Tensor, shared: bool) -> None:
        type(self).made += 1
        self.parameters = dict(loss.named_parameters())
        self.run = graphs._differentiated(loss, self.parameters)

    def replay(self, tokens: Tensor, labels: Tensor) -> Tensor:
        loss, self.gradients = self.run(tokens, labels)
        return loss

    hand_out_gradients = graphs._Graph.hand_out_gradients


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> type[Uncaptured]:
    monkeypatch.setattr(Uncaptured, "made", 0)
    monkeypatch.setattr(graphs, "_Graph", Uncaptured)
    monkeypatch.setattr(graphs, "_waiting_is_an_error", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "refusal", lambda *_: None)
    return Uncaptured


def trainer(**options: Any) -> Trainer:
    given: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 5, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    return Trainer(**given | options)


def data() -> RecallData:
    return RecallData(vocab_size=41, length=LENGTH, n_pairs=3, n_suffix=12, train_examples=64, batch_size=BATCH)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.flops: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))
        self.flops.append(pl_module.ledger.total)


def fitted(made: LanguageModeling, **options: Any) -> Losses:
    losses = Losses()
    trainer(callbacks=[losses], **options).fit(made, data())
    return losses


@every_arm
def test_replayed_steps_have_the_numbers_of_eager_ones(arm: str, uncaptured: type[Uncaptured]) -> None:
    replayed, eager = module(arm), module(arm, cuda_graphs="off")
    eager.step.begin = lambda trainer: None  # keeps the reason it was made with
    ours, theirs = fitted(replayed, gradient_clip_val=0.5), fitted(eager, gradient_clip_val=0.5)
    assert uncaptured.made == 1
    assert ours.seen == theirs.seen and len(set(ours.seen)) == 5
    assert ours.flops == theirs.flops and replayed.ledger.entries == eager.ledger.entries
    assert ours.flops == [ours.flops[0] * step for step in range(1, 6)] and ours.flops[0] > 0
    assert_same(replayed.lm.state_dict(), eager.lm.state_dict())
    assert replayed.step._graph is None  # its memory does not outlive the fit


def test_a_batch_of_another_shape_runs_eagerly_and_says_so(
    uncaptured: type[Uncaptured], caplog: pytest.LogCaptureFixture
) -> None:
    made, plain = module(), module()
    made.step.begin(trainer())
    shapes = [LENGTH, LENGTH, LENGTH - 3, LENGTH, LENGTH - 3]
    for (tokens, labels), length in zip(batches(5), shapes, strict=True):
        tokens, labels = tokens[:, :length], labels[:, :length]
        loss = made.step.forward(tokens, labels)
        made.step.backward(loss.backward)
        expected = plain.step.loss(tokens, labels)
        expected.backward()
        assert float(loss.detach()) == float(expected.detach())
        assert_same(gradients(made), gradients(plain))
    assert uncaptured.made == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name == graphs.__name__]
    assert line == "a batch of shape (4, 29) runs without the CUDA graph, which is for (4, 32)"
    window, short = (BATCH * made.lm.flops(n, 0, head="all").training().total for n in (LENGTH, LENGTH - 3))
    assert made.ledger.total == 3 * window + 2 * short


def test_weights_keep_one_name_in_checkpoints() -> None:
    assert {name.split(".")[0] for name in module().state_dict()} == {"lm"}


class OnGpu(SingleDeviceStrategy):
    """A strategy that says it drives a GPU; nothing is sent there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(device="cpu", **options)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Scaled(MixedPrecision):
    def __init__(self) -> None:
        super().__init__("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu"))


def on_gpu(precision: Any = None, **options: Any) -> Trainer:
    made = trainer(**options)
    made.strategy._root = None
    made.strategy.__class__ = OnGpu
    if precision is not None:
        made.strategy.precision_plugin = precision
    return made


def test_what_can_be_captured_is() -> None:
    assert refusal("auto", on_gpu(), "triton") is None


@pytest.mark.parametrize(
    ("reason", "mode", "made", "backend"),
    [
        ("model.cuda_graphs is off", "off", on_gpu, "triton"),
        ("the device is cpu", "auto", trainer, "triton"),
        ("backend reference is not made for it", "auto", on_gpu, "reference"),
        ("gradients are accumulated over batches", "auto", lambda: on_gpu(accumulate_grad_batches=2), "triton"),
        (
            "gradients are accumulated over batches", "auto",
            lambda: on_gpu(callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})]), "triton",
        ),
        ("the loss is scaled for fp16", "auto", lambda: on_gpu(Scaled()), "triton"),
    ],
)  # fmt: skip
def test_steps_that_stay_eager_say_why(reason: str, mode: str, made: Any, backend: str) -> None:
    assert refusal(mode, made(), backend) == reason


def test_detecting_anomalies_and_exchanging_gradients_keep_steps_eager() -> None:
    with torch.autograd.set_detect_anomaly(True):
        assert refusal("auto", on_gpu(), "triton") == "trainer.detect_anomaly reads every gradient"
    several = trainer()
    several.strategy.__class__ = type("OnGpus", (DDPStrategy,), {"root_device": torch.device("cuda", 0)})
    assert "exchanges gradients during the backward pass" in refusal("auto", several, "triton")


def test_a_fit_on_a_cpu_says_nothing_aloud_but_records_why(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    made = module()
    with caplog.at_level(logging.INFO, logger="simba_lab"):
        fitted(made, max_steps=1)
    lines = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == graphs.__name__]
    assert lines == [(logging.INFO, "training steps run without CUDA graphs: the device is cpu")]
    assert made.step.reason == "the device is cpu"


def test_the_key_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="model.cuda_graphs must be one of auto, off, got 'on'"):
        Step(module().step.loss, Ledger(), "on")
    config = tiny.write_yaml(tmp_path / "e.yaml", tiny.EXPERIMENT, {"model.cuda_graphs": "always"})
    assert "cuda_graphs" in tiny.mistake(capsys, "fit", "--config", config)


class Waits(Criterion):
    """Reads a score on the host, which no graph can hold."""

    def score(self, signals: Signals) -> Tensor:
        return signals.positions.float() * float(signals.x.detach().abs().sum() > -1)

    def flops(self, shape: ScoredShape) -> int:
        return 0


GPU = {"accelerator": "gpu", "devices": 1}


@pytest.mark.gpu
@every_arm
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_on_a_gpu_replayed_steps_equal_eager_ones_bit_for_bit(arm: str, precision: str) -> None:
    replayed, eager = module(arm), module(arm, cuda_graphs="off")
    options = {**GPU, "precision": precision, "gradient_clip_val": 0.5}
    captured: list[int] = []
    original = graphs._capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_capture", lambda *given: captured.append(1) or original(*given))
        ours = fitted(replayed, **options)
    theirs = fitted(eager, **options)
    assert (replayed.step.reason, eager.step.reason) == (None, "model.cuda_graphs is off") and captured == [1]
    assert ours.seen == theirs.seen and len(set(ours.seen)) == 5
    assert replayed.ledger.entries == eager.ledger.entries
    assert_same(replayed.lm.state_dict(), eager.lm.state_dict())


@pytest.mark.gpu
def test_on_a_gpu_the_update_is_one_fused_kernel_and_clipping_still_clips() -> None:
    made = module()
    fit = trainer(**GPU, precision="bf16-mixed", gradient_clip_val=1e-3, max_steps=3)
    norms: list[float] = []
    made.on_before_optimizer_step = lambda optimizer: norms.append(
        float(torch.stack([p.grad.norm() for p in made.lm.parameters()]).norm())
    )
    fit.fit(made, data())
    assert all(group["fused"] for group in fit.optimizers[0].param_groups)
    # The hook runs before clipping; what is left in .grad afterwards was clipped.
    assert norms[-1] > 1e-2
    left = torch.stack([p.grad.norm() for p in made.lm.parameters()]).norm()
    assert float(left) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_criterion_that_waits_keeps_steps_eager(caplog: pytest.LogCaptureFixture) -> None:
    pruning = PrunedTraining(n_context=N_CONTEXT, criterion=f"{__name__}.Waits", mean_keep=0.6)
    made = LanguageModeling(ModelConfig(**SHAPE), pruning)
    assert len(fitted(made, **GPU, precision="bf16-mixed").seen) == 5
    assert made.step.reason == "the forward pass waits for the device, probably in a criterion"
    assert "without CUDA graphs" in caplog.text
