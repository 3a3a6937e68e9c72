"""NaN and infinity are named and stop a run; half precision orders 65,536 tokens as fp64 does; seeds repeat."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_tampering import SHAPE, pruned, windows

from simba_lab.errors import NotFinite
from simba_lab.evaluate.windows import score_windows
from simba_lab.kernels import resolve
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, Criterion, Signals
from simba_lab.pruning.hashing import sequence_key
from simba_lab.training.guard import diagnosis, first_bad_weight
from simba_lab.training.loss import TokenLoss

TOKENS, CHANNELS, STATES, WIDTH = 65_536, 4, 4, 8


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def fit(config: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """``simba-lab fit`` in a process of its own."""
    command = [sys.executable, "-m", "simba_lab", "fit", "--config", str(config), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.parent)


def poison(model: LanguageModel, layer: int) -> None:
    """The layer's convolution overflows: its own output is the first that is not finite."""
    with torch.no_grad():
        model.backbone.layers[layer].mixer.conv1d.bias.fill_(3e38)
        model.backbone.layers[layer].mixer.x_proj.weight.fill_(3e38)


def test_a_loss_that_overflows_stops_the_fit_and_names_step_and_layer(lab: tiny.Lab, tmp_path: Path) -> None:
    """A learning rate that no model survives; the checkpoints written before stay, and hold finite weights."""
    wild = {"model.learning_rate": 1e30, "model.warmup_steps": 0}
    changes = wild | {"trainer.max_steps": 40, "checkpoint.every_n_steps": 1}
    done = fit(lab.experiment(tmp_path / "wild.yaml", changes))
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert line.startswith("simba-lab: error: the ") and " step " in line and "finite" in line
    checkpoints = list((tmp_path / "runs" / "wild" / "checkpoints").glob("*.ckpt"))
    assert ("last.ckpt is good" in line) == bool(checkpoints)
    for path in checkpoints:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(weight).all() for weight in weights.values()), path
    assert not (tmp_path / "runs" / "wild" / "model.safetensors").exists()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_diagnosis_names_the_first_layer_whose_output_is_not_finite(layer: int) -> None:
    model = LanguageModel(SHAPE, seed=1, backend="reference")
    batch = {"tokens": windows().tokens, "labels": windows().tokens}
    assert diagnosis(TokenLoss(model, None), batch) == "a second pass over its batch is finite"
    poison(model, layer)
    assert diagnosis(TokenLoss(model, None), batch).startswith(f"the output of lm.backbone.layers.{layer}.mixer")
    with torch.no_grad():
        model.backbone.layers[layer].mixer.D[1] = torch.inf
    assert first_bad_weight(model) == f"backbone.layers.{layer}.mixer.D"
    assert diagnosis(TokenLoss(model, None), batch) == f"the weight lm.backbone.layers.{layer}.mixer.D is not finite"
    assert not [module for module in model.modules() if module._forward_hooks]


def test_a_state_that_overflows_stops_the_arm_and_names_layer_and_windows() -> None:
    model = pruned()
    poison(model, 1)
    with pytest.raises(NotFinite, match="a (score|state) of layer [01] is not finite in windows 0 to 1"):
        score_windows(model, windows(), 2)


class Undefined(Criterion):
    """The score of layer 1 is 0 / 0 for one token of the third sequence."""

    def score(self, signals: Signals) -> torch.Tensor:
        scores = signals.x.sum(-1)
        sound = signals.sequence_key != (THIRD if signals.layer == 1 else 0)
        return scores / torch.where(signals.positions == 3, sound[:, None], True)


THIRD = int(sequence_key(windows().tokens[2:3, :24]))


@pytest.mark.filterwarnings("ignore:.*invalid value")
def test_a_score_that_is_not_finite_stops_the_arm_and_names_layer_and_windows() -> None:
    with pytest.raises(NotFinite, match="a score of layer 1 is not finite in windows 2 to 3"):
        score_windows(pruned(Undefined()), windows(), 2)


def signals(dtype: torch.dtype, per_head: bool, backend: str) -> Signals:
    """64 k tokens of a layer whose decays reach from one token to all of them; rounded to bf16 whatever the dtype.

    So the inputs are the same numbers in every precision but fp16, whose rounding they survive too: what differs is
    the arithmetic.
    """
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(torch.bfloat16).to(torch.float64)  # noqa: E731
    steps, vector = (2, (1, STATES)) if per_head else (CHANNELS, (STATES,))
    wide = torch.promote_types(dtype, torch.float32)
    rates = torch.logspace(-4, 1, steps if per_head else steps * STATES, dtype=torch.float64).to(torch.bfloat16)
    return Signals(
        layer=0, backend=resolve(backend, "cpu"),
        x=draw(1, TOKENS, CHANNELS).to(dtype), dt=draw(1, TOKENS, steps).to(dtype),
        dt_bias=torch.full((steps,), -4.0, dtype=wide),
        A=-rates.to(wide) if per_head else -rates.to(wide).view(steps, STATES),
        B=draw(1, TOKENS, *vector).to(dtype), C=draw(1, TOKENS, *vector).to(dtype),
        z=draw(1, TOKENS, CHANNELS).to(dtype), hidden=draw(1, TOKENS, WIDTH).to(dtype),
        positions=torch.arange(TOKENS)[None], sequence_key=torch.tensor([5]),
    )  # fmt: skip


# Share of the 10 % highest scores of fp64 that the dtype names too; what is missing are ties at the edge.
AGREEMENT = {torch.float16: 0.99, torch.bfloat16: 0.99, torch.float32: 0.9999}


@pytest.mark.parametrize("dtype", AGREEMENT, ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("name", ["global_impact", "local_delta", "norm", "random", "recency"])
def test_half_precision_orders_64k_tokens_as_fp64_does(name: str, per_head: bool, dtype: torch.dtype) -> None:
    criterion = CRITERIA.build(name)
    exact = criterion.score(signals(torch.float64, per_head, "reference"))[0].double()
    for backend in ("reference", "auto"):
        scores = criterion.score(signals(dtype, per_head, backend))
        assert scores.dtype in (torch.float32, torch.float64), "scores are in fp32 at least"
        assert torch.isfinite(scores).all()
        k = TOKENS // 10
        theirs, ours = (set(s.argsort(stable=True)[-k:].tolist()) for s in (exact, scores[0]))
        assert len(theirs & ours) >= AGREEMENT[dtype] * k, f"{backend}: {len(theirs & ours)} of {k}"
        spread = float(exact.abs().max())
        assert float((scores[0].double() - exact).abs().max()) <= 0.01 * spread, backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_delta_are_in_fp32(dtype: torch.dtype) -> None:
    """65,536 steps of softplus(-4) sum to 1,189: fp16 would end at 64, where a step is lost in rounding, bf16 at 4."""
    given = signals(dtype, False, "reference")
    assert given.delta.dtype == torch.float32
    total, exact = given.delta.cumsum(1)[0, -1], signals(torch.float64, False, "reference").delta.sum(1)[0]
    torch.testing.assert_close(total.double(), exact, rtol=1e-4, atol=0)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(lab: tiny.Lab, tmp_path: Path) -> None:
    """A fit in this process, one in another, and one with trainer.deterministic."""
    runs = {"again": {}, "strict": {"trainer.deterministic": True}}
    with ThreadPoolExecutor(len(runs)) as pool:
        files = [lab.experiment(tmp_path / f"{name}.yaml", changes) for name, changes in runs.items()]
        for done in pool.map(fit, files):
            assert done.returncode == 0, done.stderr
    first = load_file(lab.run / "model.safetensors")
    weights = {name: load_file(tmp_path / "runs" / name / "model.safetensors") for name in runs}
    for name in ("again", "strict"):
        assert all(torch.equal(first[key], weights[name][key]) for key in first), name
    initial = [LanguageModel(SHAPE, seed=seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(initial[0], initial[1]) and not torch.equal(initial[0], initial[2])


@pytest.mark.gpu
def test_deterministic_training_on_a_gpu_is_bit_identical(lab: tiny.Lab, tmp_path: Path) -> None:
    changes = {"trainer.deterministic": True, "trainer.accelerator": "gpu"}
    for name in ("one", "two"):
        done = fit(lab.experiment(tmp_path / f"{name}.yaml", changes))
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("one", "two"))
    assert all(np.array_equal(one[key].numpy(), two[key].numpy()) for key in one)
