"""Training: golden losses, exact resume, the FLOPs ledger, what is scored, and that every setting has an effect.

``python tests/test_training.py`` writes the golden losses anew.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

import simba_lab
from simba_lab.data import RecallData, TextData
from simba_lab.environment import describe
from simba_lab.errors import InputError
from simba_lab.kernels.cost import CONVENTION
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.training import LanguageModeling, PrunedTraining, read_experiment

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
TOLERANCE = 1e-4
STEPS, BATCH, LENGTH, N_CONTEXT = 10, 4, 48, 32
IMPACT = {"class_path": "global_impact", "init_args": {"reduce": "absmax", "gated": True}}
PRUNING = {"n_context": N_CONTEXT, "criterion": IMPACT, "schedule": "linear", "mean_keep": 0.6}
RUNS: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {"model.pruning": PRUNING}}
CLOCK = ("train/tokens_per_second", "train/gflops_per_second")


def write_words(path: Path) -> Path:
    """Text that no Python version changes: sentences of common words, drawn by Python's own generator."""
    words = "the river of light and stone was never still but every winter its old bridge held one letter".split()
    draw = random.Random(7)
    lines = [" ".join(words[int(draw.random() ** 2 * len(words))] for _ in range(12)) for _ in range(36)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def fit(folder: Path, changes: Mapping[str, Any], *arguments: str) -> int:
    """A training run of ten steps in ``folder`` on text that is the same everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "data.init_args.source": str(write_words(folder / "words.txt")),
        "data.init_args.cache_dir": str(folder / "cache"),
        "data.init_args.tokenizer": "bytes",
        "data.init_args.length": LENGTH,
        "data.init_args.batch_size": BATCH,
        "trainer.default_root_dir": str(folder),
        "trainer.max_steps": STEPS,
    }
    config = tiny.write_yaml(folder / "experiment.yaml", tiny.EXPERIMENT, settings | dict(changes))
    return tiny.simba_lab("fit", "--config", config, *arguments)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock decides."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def losses(folder: Path) -> list[float]:
    return [row["train/loss"] for row in rows(folder) if "train/loss" in row]


@pytest.fixture(scope="module", params=list(RUNS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    assert fit(folder, RUNS[request.param]) == 0
    return request.param, folder


def test_losses_are_the_golden_ones(trained: tuple[str, Path]) -> None:
    name, folder = trained
    golden = json.loads(GOLDEN.read_text())[name]
    assert len(golden) == STEPS and golden[-1] < golden[0] - 0.5
    np.testing.assert_allclose(losses(folder), golden, rtol=0, atol=TOLERANCE)


def test_a_second_run_is_the_same_bit_for_bit(trained: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = trained
    assert fit(tmp_path, RUNS[name]) == 0
    assert rows(tmp_path) == rows(folder)
    assert_same_weights(tmp_path, folder)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_ledger_is_the_closed_form_times_the_steps(trained: tuple[str, Path]) -> None:
    name, folder = trained
    model, record = simba_lab.load(folder), json.loads((folder / "run.json").read_text())
    window = model.flops(N_CONTEXT, LENGTH - N_CONTEXT) if name == "pruned" else model.flops(LENGTH, 0, head="all")
    expected = {op: STEPS * BATCH * flops for op, flops in window.training().by_op().items()}
    assert record["training_flops_by_op"] == expected
    assert record["training_flops"] == sum(expected.values())
    assert record["tokens"] == STEPS * BATCH * LENGTH
    assert ("score" in expected) == (name == "pruned")


def test_a_run_folder_describes_itself(trained: tuple[str, Path]) -> None:
    name, folder = trained
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"], record["convention"]) == ("done", STEPS, CONVENTION)
    assert record["environment"] == describe() and record["backend"] == simba_lab.load(folder).backend.name
    assert record["parameters"] == sum(p.numel() for p in simba_lab.load(folder).parameters()) and record["seconds"] > 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["model"]["expand"] == 2 and config["data"]["init_args"]["validation_share"] == 0.08
    pruning = simba_lab.load(folder).pruning
    assert pruning is None if name == "dense" else pruning.spec()["criterion"] == IMPACT
    assert config["model"]["pruning"] is None or config["model"]["pruning"]["criterion"] == IMPACT
    experiment = read_experiment(folder / "config.yaml")
    assert experiment.folder == folder and experiment.is_trained()
    assert (folder / "tokenizer.json").is_file() and (folder / "checkpoints" / "last.ckpt").is_file()
    last = [key for row in rows(folder)[-2:] for key in row]
    assert {"test/loss", "test/accuracy", "test/bits_per_byte", "test/xz_bits_per_byte"} <= set(last)


def test_bits_per_byte_are_nats_over_bytes(trained: tuple[str, Path]) -> None:
    """With a byte tokenizer and no end of text among the labels, bits per byte are nats per token over ln 2."""
    _, folder = trained
    tested = next(row for row in rows(folder) if "test/loss" in row)
    assert tested["test/bits_per_byte"] == pytest.approx(tested["test/loss"] / math.log(2), rel=1e-5)


class Stop(Exception):
    """The power goes off."""


def stop_before_step(monkeypatch: pytest.MonkeyPatch, number: int, how: type[BaseException] = Stop) -> None:
    """The training step after ``number`` finished ones raises."""
    original = LanguageModeling.training_step

    def training_step(self: LanguageModeling, batch: dict[str, torch.Tensor], batch_index: int) -> torch.Tensor:
        if self.trainer.global_step == number:
            raise how
        return original(self, batch, batch_index)

    monkeypatch.setattr(LanguageModeling, "training_step", training_step)


def test_a_stopped_run_continues_as_if_it_had_not_been(
    trained: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first and in the second epoch, each time behind the last checkpoint."""
    name, folder = trained
    changes = RUNS[name]
    for number, saved, arguments in ((5, 4, []), (9, 8, ["--ckpt_path", "last"])):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_before_step(patch, number)
            fit(tmp_path, changes, *arguments)
        record = json.loads((tmp_path / "run.json").read_text())
        assert (record["status"], record["step"]) == ("interrupted", number)
        assert not (tmp_path / "model.safetensors").exists()
        checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == saved
    assert fit(tmp_path, changes, "--ckpt_path", "last") == 0
    assert rows(tmp_path) == rows(folder)
    assert_same_weights(tmp_path, folder)
    ours, theirs = (json.loads((f / "run.json").read_text()) for f in (tmp_path, folder))
    same = ("status", "step", "tokens", "training_flops", "training_flops_by_op", "backend", "parameters")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert (tmp_path / "config.yaml").read_text().count("last") == 0


def test_the_runs_cross_the_border_of_an_epoch(trained: tuple[str, Path]) -> None:
    """Or the test above would not show that the second epoch's order is restored."""
    batches = len(read_experiment(trained[1] / "config.yaml").data.train_dataloader())
    assert 5 < batches < 8


def test_ctrl_c_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    stop_before_step(monkeypatch, 1, KeyboardInterrupt)
    try:
        assert fit(tmp_path, {}) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "model.safetensors").exists()


def test_resuming_another_model_is_refused(trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = trained
    before = (folder / "model.safetensors").read_bytes()
    arguments = ("--config", folder / "experiment.yaml", "--ckpt_path", "last", "--model.model.d_state", "5")
    assert "ckpt_path" in tiny.mistake(capsys, "fit", *arguments)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_other_subcommands_measure_the_checkpoint(
    trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = trained
    config = (folder / "config.yaml").read_bytes()
    for command in ("validate", "test", "predict"):
        assert tiny.simba_lab(command, "--config", folder / "config.yaml", "--ckpt_path", "last") == 0
    assert (folder / "config.yaml").read_bytes() == config
    assert "test/bits_per_byte" in capsys.readouterr().out


SHAPE: dict[str, Any] = {"d_model": 12, "n_layer": 3, "vocab_size": 21, "d_state": 3}


def module(shape: Mapping[str, Any] | None = None, pruning: Mapping[str, Any] | None = None, **options: Any) -> Any:
    plan = None if pruning is None else PrunedTraining(**pruning)
    return LanguageModeling(ModelConfig(**SHAPE | dict(shape or {})), plan, **options)


def a_batch() -> dict[str, torch.Tensor]:
    stream = torch.randint(1, 21, (2, 41), generator=torch.Generator().manual_seed(1))
    labels = stream[:, 1:].clone()
    labels[:, ::7] = -100
    return {"tokens": stream[:, :-1], "labels": labels}


def loss_of(made: Any, batch: Mapping[str, torch.Tensor]) -> float:
    with torch.no_grad():
        logits, labels = made.scored(batch)
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


@torch.no_grad()
def test_pruned_training_scores_boundary_and_suffix_alone() -> None:
    n_context, batch = 24, a_batch()
    made = module(pruning={"n_context": n_context, "mean_keep": 0.6})
    logits = made.lm(batch["tokens"], n_context=n_context).logits.double()
    terms = []
    for row in range(2):
        for position in range(n_context - 1, 40):
            label = int(batch["labels"][row, position])
            if label >= 0:
                scores = logits[row, position - n_context + 1]
                terms.append(math.log(sum(math.exp(score) for score in scores)) - float(scores[label]))
    assert loss_of(made, batch) == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    before, boundary = ({**batch, "labels": batch["labels"].clone()} for _ in range(2))
    before["labels"][:, : n_context - 1] = 3
    boundary["labels"][:, n_context - 1] = 3
    assert loss_of(made, before) == loss_of(made, batch) != loss_of(made, boundary)


def test_only_matrices_decay() -> None:
    made = module(weight_decay=0.3, shape={"tie_embeddings": False}, betas=(0.5, 0.6))
    optimizer = made.configure_optimizers()["optimizer"]
    names = {id(parameter): name for name, parameter in made.lm.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == dict(made.lm.named_parameters()).keys()
    matrices = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    expected = {f"backbone.layers.{layer}.mixer.{matrix}" for layer in range(3) for matrix in matrices}
    assert {name for name, value in decay.items() if value == 0.3} == expected
    assert {value for name, value in decay.items() if name not in expected} == {0.0}
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)


class RatesSeen(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(steps: int = 6, **options: Any) -> list[float]:
    seen = RatesSeen()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[seen],
    )  # fmt: skip
    data = RecallData(vocab_size=21, length=16, n_pairs=2, train_examples=64, batch_size=4)
    trainer.fit(module({"n_layer": 1}, **options), data)
    return seen.rates


def test_learning_rates_rise_linearly_and_fall_as_a_cosine() -> None:
    half = 0.2 + 0.8 * 0.5 * (1 + math.sqrt(0.5))
    given = {"learning_rate": 0.01, "warmup_steps": 2, "final_lr_share": 0.2}
    shares = [0.5, 1.0, 1.0, half, 0.6, 1.2 - half]
    assert rates(**given) == pytest.approx([0.01 * share for share in shares])
    assert rates(2, learning_rate=0.02, warmup_steps=0) == pytest.approx([0.02, 0.02 * 0.55])


SHAPE_CHANGES = {
    "d_model": 14, "n_layer": 4, "vocab_size": 25, "d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5,
    "dt_min": 0.01, "dt_max": 0.5, "dt_init_floor": 0.05, "norm_eps": 1.0, "tie_embeddings": False,
    "pad_vocab_size_multiple": 16, "bias": True, "conv_bias": False, "d_intermediate": 8,
}  # fmt: skip
MAMBA2 = {"layer": "mamba2", "d_model": 16, "headdim": 8}
MAMBA2_CHANGES = {"layer": "mamba1", "headdim": 16, "ngroups": 2}
PRUNING_CHANGES = {
    "n_context": 30, "criterion": "norm", "schedule": "geometric", "mean_keep": 0.7, "protect_recent": 0.9,
    "convolution": "adjacent",
}  # fmt: skip


def test_every_field_of_the_model_has_an_effect() -> None:
    """But ``chunk_size``, which rounding alone depends on: the tests of Mamba-2's kernels vary it."""
    covered = SHAPE_CHANGES.keys() | MAMBA2_CHANGES.keys() | {"chunk_size"}
    assert covered == {field.name for field in dataclasses.fields(ModelConfig)}
    for base, changes in (({}, SHAPE_CHANGES), (MAMBA2, MAMBA2_CHANGES)):
        plain = first_loss(module(base))
        assert first_loss(module(base)) == plain
        for key, value in changes.items():
            shape = {"d_model": 16} if value == "mamba1" else base | {key: value}
            assert first_loss(module(shape)) != plain, key


def first_loss(made: Any) -> tuple[float, int]:
    """Loss before training, and parameters: biases start at zero."""
    return loss_of(made, a_batch()), sum(parameter.numel() for parameter in made.parameters())


def test_every_field_of_pruned_training_has_an_effect() -> None:
    assert PRUNING_CHANGES.keys() == {field.name for field in dataclasses.fields(PrunedTraining)}
    given = {"n_context": 24, "criterion": "recency", "schedule": "linear", "mean_keep": 0.6}
    plain = loss_of(module(pruning=given), a_batch())
    changed = {key: loss_of(module(pruning=given | {key: value}), a_batch()) for key, value in PRUNING_CHANGES.items()}
    # Recency keeps the newest anyway: there, protecting them changes nothing, nor is a neighbour missing.
    norm = given | {"criterion": "norm"}
    for key in ("protect_recent", "convolution"):
        assert changed.pop(key) == pytest.approx(plain, abs=1e-6), key
        other = loss_of(module(pruning=norm | {key: PRUNING_CHANGES[key]}), a_batch())
        assert abs(other - loss_of(module(pruning=norm), a_batch())) > 1e-4, key
    assert [key for key, value in changed.items() if value == plain] == []


def test_seed_and_backend_of_the_module_have_an_effect() -> None:
    assert loss_of(module(seed=1), a_batch()) != loss_of(module(), a_batch())
    slow = module(backend="reference")
    assert slow.lm.backend.name == "reference" and loss_of(slow, a_batch()) == pytest.approx(
        loss_of(module(), a_batch()), abs=1e-5
    )
    with pytest.raises(InputError, match="backend"):
        module(backend="abacus")


def test_weights_that_the_global_generator_does_not_decide(trained: tuple[str, Path]) -> None:
    """Initial weights follow the seed alone, whatever was drawn before."""
    torch.manual_seed(5)
    one = module().lm.state_dict()
    torch.manual_seed(6)
    assert all(torch.equal(weight, one[name]) for name, weight in module().lm.state_dict().items())


@pytest.mark.parametrize(
    ("given", "weights", "data"),
    [({"seed_everything": 5}, 5, 5), ({"seed_everything": 5, "model.seed": 0}, 0, 5),
     ({"seed_everything": 5, "data.init_args.seed": 2}, 5, 2), ({"seed_everything": False}, 0, 0)],
    ids=["both", "but the weights", "but the data", "none"],
)  # fmt: skip
def test_seed_everything_is_the_seed_of_what_has_none(
    given: dict[str, Any], weights: int, data: int, tmp_path: Path
) -> None:
    changes = {
        "data.init_args.source": str(write_words(tmp_path / "words.txt")), "data.init_args.tokenizer": "bytes",
        "data.init_args.cache_dir": str(tmp_path / "cache"), "trainer.default_root_dir": str(tmp_path / "run"),
    }  # fmt: skip
    read = read_experiment(tiny.write_yaml(tmp_path / "seeded.yaml", tiny.EXPERIMENT, changes | given))
    assert (read.resolved["model"]["seed"], read.resolved["data"]["init_args"]["seed"]) == (weights, data)
    of_seed = LanguageModel(read.model.config, seed=weights).state_dict()
    assert all(torch.equal(weight, of_seed[name]) for name, weight in read.model.state_dict().items())
    assert read.data.seed == data


def test_a_run_from_another_seed_is_another_run(tmp_path: Path) -> None:
    """And says with which: the saved configuration names the seeds and is that run's own."""
    seeds = {"a": 0, "b": 1, "c": 1}
    for name, seed in seeds.items():
        assert fit(tmp_path / name, {"trainer.max_steps": 2}, "--seed_everything", str(seed)) == 0
    one, other, same = (losses(tmp_path / name) for name in seeds)
    assert other == same and other[0] != one[0]
    saved = tmp_path / "b" / "config.yaml"
    assert "seed: 1" in saved.read_text() and read_experiment(saved).is_trained()


def text_settings(folder: Path) -> dict[str, Any]:
    return {
        "source": str(tiny.write_corpus(folder / "text.jsonl", documents=20)), "vocab_size": 300, "length": 64,
        "batch_size": 2, "validation_windows": 6, "test_windows": 6, "cache_dir": str(folder / "cache"),
    }  # fmt: skip


def outcome(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Everything a training run sees of its data."""
    data = TextData(**settings)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    tokens = [tuple(batch["tokens"].flatten().tolist() for batch in loader) for loader in loaders]
    return tuple(map(str, tokens)), loaders[0].num_workers, data.corpus.folder.parent


def test_models_from_different_seeds_are_compared_on_the_same_windows(tmp_path: Path) -> None:
    one, other = (TextData(**text_settings(tmp_path), seed=seed).eval_windows("test", 40, 8, 5) for seed in (0, 1))
    assert np.array_equal(one.tokens, other.tokens) and len(one.tokens) == 5


def test_every_field_of_the_text_data_has_an_effect(tmp_path: Path) -> None:
    settings = text_settings(tmp_path)
    other = tiny.write_corpus(tmp_path / "other.jsonl", documents=20, characters=2000)
    both = "".join(
        json.dumps({**json.loads(line), "upper": json.loads(line)["text"].upper()}) + "\n"
        for line in Path(settings["source"]).read_text(encoding="utf-8").splitlines()
    )
    Path(settings["source"]).write_text(both, encoding="utf-8")
    changes = {
        "source": str(other), "text_field": "upper", "validation_source": str(other), "test_source": str(other),
        "validation_share": 0.3, "test_share": 0.4, "tokenizer": "bytes", "vocab_size": 310, "length": 60,
        "recall_share": 0.3,
        "batch_size": 3, "validation_windows": 2, "test_windows": 2, "seed": 1, "cache_dir": str(tmp_path / "other"),
    }  # fmt: skip
    plain = outcome(settings)
    assert outcome(settings) == plain
    assert [key for key, value in changes.items() if outcome(settings | {key: value}) == plain] == []
    assert TextData(**settings, num_workers=2).train_dataloader().num_workers == 2
    fields = TextData.__init__.__annotations__.keys() - {"return"}
    woven = settings | {"recall_share": 0.3}
    assert outcome(woven) != outcome(woven | {"recall_reach": 100})
    assert fields == {*changes, "recall_reach", "num_workers"}


@pytest.mark.parametrize("task", [{"task": "mqar"}, {"task": "needle", "distance": [14, 20]}], ids=["mqar", "needle"])
@pytest.mark.parametrize("pruned", [False, True])
def test_recall_tasks_train(tmp_path: Path, task: dict[str, Any], pruned: bool) -> None:
    data = {"vocab_size": 40, "length": 32, "n_pairs": 3, "n_suffix": 12, "train_examples": 40, "batch_size": 4}
    data |= {"validation_examples": 8, **task}
    values = tiny.EXPERIMENT | {"data": {"class_path": "simba_lab.data.RecallData", "init_args": data}}
    changes: dict[str, Any] = {"trainer.default_root_dir": str(tmp_path), "trainer.max_steps": 2}
    if pruned:
        changes["model.pruning"] = {"n_context": 20, "mean_keep": 0.6}
    assert tiny.simba_lab("fit", "--config", tiny.write_yaml(tmp_path / "e.yaml", values, changes)) == 0
    assert len(losses(tmp_path)) == 2 and all(3 < loss < 4.5 for loss in losses(tmp_path))
    tested = rows(tmp_path)[-1]
    assert 0 <= tested["test/accuracy"] <= 1 and "test/bits_per_byte" not in tested
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_progress_bar_knows_where_a_run_ends(trained: tuple[str, Path]) -> None:
    """On a terminal the bar's length is what is left of max_steps in this epoch, not the whole epoch."""
    from simba_lab.training.progress import Bar

    class Ends(Callback):
        seen: list[float]

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.seen.append(bar.total_train_batches)

    bar, ends = Bar(), Ends()
    ends.seen = []
    data = RecallData(vocab_size=21, length=16, n_pairs=2, train_examples=16, validation_examples=4, batch_size=4)
    trainer = Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, limit_val_batches=0,
        enable_model_summary=False, callbacks=[bar, ends],
    )  # fmt: skip
    trainer.fit(module({"n_layer": 1}), data)
    assert ends.seen == [4, 2]


def test_the_progress_bar_can_be_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        folder = tmp_path / str(shown)
        assert fit(folder, {"trainer.enable_progress_bar": shown, "trainer.max_steps": 2}) == 0
        assert ("step 2/2" in capsys.readouterr().out) is shown
        assert len(losses(folder)) == 2


def rewrite_golden(write: Callable[[str], Any] = print) -> None:
    """Train both runs and write their losses down."""
    golden = {}
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            assert fit(Path(folder), changes) == 0
            golden[name] = losses(Path(folder))
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")
    write(f"wrote {GOLDEN}")


if __name__ == "__main__":
    sys.exit(rewrite_golden())
