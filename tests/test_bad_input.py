"""Every mistake takes one line on standard error, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import gzip
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_checkpoint import Trap

from simba_lab.pruning import KeepSchedule

CRITERIA = (
    "use one of banded_impact, blocks, global_impact, local_delta, lookahead_impact, norm, output_impact, "
    "query_impact, random, recency"
)
SCHEDULES = "use one of calibrated, geometric, highway_top, knots, linear, uniform"
RISING = f"{__name__}.Rising"


class Rising(KeepSchedule):
    """A user's schedule that keeps more tokens the higher the layer."""

    knob = "keep"

    def __init__(self, keep: float | None = None) -> None:
        self.keep = keep

    def shares(self, n_layers: int) -> list[float]:
        return [1.0, *(self.keep * (layer + 1) / n_layers for layer in range(1, n_layers))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str | Path) -> str:
    """The line with which a command refuses; ``folder`` must be the same afterwards, byte for byte."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    message = tiny.mistake(capsys, *arguments)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return message


def pruning(**changes: Any) -> dict[str, Any]:
    return {"model.pruning": {"n_context": 96, "mean_keep": 0.6} | changes}


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def pruned(**changes: Any) -> dict[str, Any]:
    return {"arms": [{"schedule": "linear", "criterion": "norm"} | changes]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (pruning(criterion="nrom"), f"criterion: 'nrom' is unknown (did you mean norm?); {CRITERIA}"),
        (pruning(schedule="steep"), f"schedule: 'steep' is unknown; {SCHEDULES}"),
        (pruning(criterion=part("random", sed=1)), "criterion random: unknown option 'sed'; its options: seed"),
        (pruning(criterion={"class": "random"}), "criterion: expected the keys class_path and init_args, got class"),
        (pruning(mean_keep=0), "mean_keep must lie in (0, 1], got 0"),
        (pruning(mean_keep=1.5), "mean_keep must lie in (0, 1], got 1.5"),
        (pruning(mean_keep=0.1), "mean_keep 0.1 is out of its reach"),
        (pruning(mean_keep=None), "final_keep is not set"),
        (pruning(mean_keep=None, schedule=part("linear", final_keep=-0.1)), "final_keep must lie in (0, 1], got -0.1"),
        (pruning(mean_keep=None, schedule=part("knots", values=[0.5, 2])), "values[1] must lie in (0, 1], got 2"),
        (pruning(mean_keep=None, schedule=part(RISING, keep=0.9)), "rises with depth: [1, 0.45, 0.675, 0.9]"),
        (pruning(protect_recent=1.5), "protect_recent must lie in [0, 1], got 1.5"),
        (pruning(n_context=129), "model.pruning.n_context: 129 is longer than data.length, a window of 128 tokens"),
        (pruning(n_context=0), "n_context and n_layers must be at least 1"),
        ({"seed_everything": None}, "seed_everything: null is no number; give one or leave the key out"),
        ({"seed_everything": -1}, "seed_everything: -1 must lie in 0..4294967295"),
        ({"seed_everything": 2**32}, "seed_everything: 4294967296 must lie in 0..4294967295"),
        ({"sed_everything": 0}, "sed_everything is not a key (did you mean seed_everything?)"),
        ({"model.learning_rte": 0.1}, "model.learning_rte is not a key (did you mean model.learning_rate?)"),
        ({"model.model.d_modle": 8}, "model.model.d_modle is not a key (did you mean model.model.d_model?)"),
        (pruning(critrion="norm"), "critrion is not a key (did you mean criterion?)"),
        ({"data.initargs": {}}, "data: expected the keys class_path and init_args, got"),
        ({"data.init_args.lenght": 64}, "lenght is not a key (did you mean length?)"),
        ({"trainer.max_step": 2}, "trainer.max_step is not a key (did you mean trainer.max_steps?)"),
        ({"checkpoint.every_step": 2}, "checkpoint.every_step is not a key (did you mean checkpoint.every_n_steps?)"),
        ({"model.model.d_model": "wide"}, "model.model.d_model: Expected a <class 'int'>"),
        ({"model.model.n_layer": 0}, "model.n_layer must be an integer of at least 1, got 0"),
        ({"model.learning_rate": 0}, "learning_rate must be above 0"),
        ({"model.backend": "abacus"}, "backend: 'abacus' is unknown; use one of"),
        ({"data.class_path": "simba_lab.data.TextDate"}, "module 'simba_lab.data' has no attribute 'TextDate'"),
        ({"data.init_args.length": 10**6}, "data.length: a window of 1000000 tokens"),
        ({"data.init_args.batch_size": 10**5}, "data.batch_size: 100000 is more than the"),
    ],
)  # fmt: skip
def test_an_experiment_with_a_mistake(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Mapping[str, Any], named: str
) -> None:
    experiment = lab.experiment(tmp_path / "experiment.yaml", changes)
    assert named in refused(capsys, tmp_path, "fit", "--config", experiment)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b'{"text": "  "}\n', "holds no text"),
        ("binary.txt", b"\x7fELF\x00\x01", "binary file (NUL byte at offset 4); expected UTF-8 text"),
        ("latin.txt", "Erzähl mir was".encode("latin-1"), "not UTF-8 at byte 3"),
        ("cut.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-9], "expected a complete .gz file"),
        ("half.jsonl", b'{"text": "whole"}\n{"text": "ha', "half.jsonl"),
        ("other.jsonl", b'{"body": "whole"}\n', "text"),
        (None, b"", "no file"),
    ],
)
def test_data_that_cannot_be_used(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: bytes, named: str
) -> None:
    source = tmp_path / (name or "missing.txt")
    if name is not None:
        source.write_bytes(content)
    changes = {"data.init_args.source": str(source), "data.init_args.cache_dir": str(tmp_path / "cache")}
    message = refused(capsys, tmp_path, "fit", "--config", lab.experiment(tmp_path / "experiment.yaml", changes))
    assert named in message and source.name in message


@pytest.mark.parametrize("command", ["fit", "sweep"])
@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "does not exist; its folder"), (b"a: [1", "not YAML"), (b"- 1\n", "expected keys"), (b"\xff", "not YAML")],
)
def test_a_file_that_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, content: bytes | None, named: str
) -> None:
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_bytes(content)
    message = refused(capsys, tmp_path, command, "--config", file)
    assert named in message and str(file) in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (pruned(criterion="nrom"), f"'nrom' is unknown (did you mean norm?); {CRITERIA}"),
        (pruned(schedule="liner"), f"'liner' is unknown (did you mean linear?); {SCHEDULES}"),
        (pruned(schedule=RISING), "rises with depth"),
        (pruned(schedule=part("uniform", keep=1.2)), "keep must lie in (0, 1], got 1.2"),
        ({"arms": [{"knd": "dense"}]}, "arms.0.knd is not a key (did you mean kind?)"),
        ({"arms": [{"kind": "sparse"}]}, "arms.0.kind: input should be 'pruned', 'dense'"),
        ({"arms": []}, "arms: name at least one"),
        ({"windws": 3}, "windws is not a key (did you mean windows?)"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"n_context": "long"}, "n_context: input should be a valid integer"),
        ({"n_context": 10**6}, "n_context + n_suffix: a window of 1000016 tokens is longer than every test document"),
        ({"budget.tolerence": 1}, "budget.tolerence is not a key (did you mean tolerance?)"),
        ({"budget.tolerance": 2}, "budget.tolerance must lie in [0, 1), got 2"),
        ({"budget": {}}, "budget: give either reference"),
        ({"budget": {"flops": 0}}, "budget.flops must be at least 1, got 0"),
        ({"search": {"trails": 3}}, "search.trails is not a key (did you mean trials?)"),
        ({"search": {"windows": 0}}, "search.windows must be at least 1, got 0"),
        ({"search": {"criterion": "nrom"}}, "'nrom' is unknown"),
        ({"search": {"seed": -1}}, "search.seed must be at least 0, got -1"),
        ({"recall": {"distance": 10, "facts": 0}}, "recall.facts: 0 of the form 'sentence' must lie in 1..54"),
        ({"recall": {"distance": 10, "form": "riddle"}}, "recall.form: input should be 'sentence', 'pair' or"),
        ({"recall": {"facts": 1}}, "recall.distance: field required"),
        ({"statistics": {"resample": 3}}, "statistics.resample is not a key (did you mean resamples?)"),
        ({"statistics": {"confidence": 95}}, "confidence must lie in (0, 1)"),
        ({"statistics": {"seed": -1}}, "statistics.seed must be at least 0, got -1"),
        ({"experiment": "nowhere.yaml"}, "experiment: nowhere.yaml does not exist"),
        ({"experiment": None}, "experiment: input should be a valid string"),
    ],
)  # fmt: skip
def test_a_sweep_with_a_mistake(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Mapping[str, Any], named: str
) -> None:
    """On an experiment that is not trained, so that a refusal that comes too late would train it."""
    untrained = {"experiment": str(lab.experiment(tmp_path / "untrained.yaml"))}
    if "arms" in changes and changes["arms"]:
        changes = {"arms": [tiny.SWEEP["arms"][0], *changes["arms"]]}
        named = named.replace("arms.0", "arms.1")
    file = lab.sweep(tmp_path / "sweep.yaml", untrained | dict(changes))
    assert named in refused(capsys, tmp_path, "sweep", "--config", file)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("windows", "'windows' should be key=value"),
        ("=3", "'=3' should be key=value"),
        ("windows.x=3", "windows in 'windows.x' has no keys of its own"),
        ("arms.9.kind=dense", "9 in 'arms.9.kind' is no entry of a list of 5; they are numbered from 0"),
        ("arms.first.kind=dense", "first in 'arms.first.kind' is no entry"),
        ("arms.0.name.x=1", "name in 'arms.0.name.x' has no keys of its own"),
        ("windows=[3", "the value of windows, '[3', is not YAML"),
        ("windows=many", "windows: input should be a valid integer"),
        ("wndows=3", "wndows is not a key (did you mean windows?)"),
        ("budget.flops=3", "budget: give either reference"),
        ("n_context=-3", "n_context must be at least 1, got -3"),
    ],
)
def test_nonsense_in_set(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    file = lab.sweep(tmp_path / "sweep.yaml")
    assert named in refused(capsys, tmp_path, "sweep", "--config", file, "--set", override)


@pytest.mark.parametrize(
    ("arm", "named"),
    [
        ("linear:nrom@0.6", f"'nrom' is unknown (did you mean norm?); {CRITERIA}"),
        ("liner:norm@0.6", f"'liner' is unknown (did you mean linear?); {SCHEDULES}"),
        ("linear:norm", "'linear:norm' should be dense or schedule:criterion@mean_keep"),
        ("linear:norm@1.2", "mean_keep must lie in (0, 1], got 1.2"),
        (f"{RISING}:norm@0.6", "rises with depth"),
    ],
)
def test_an_arm_of_eval_with_a_mistake(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], arm: str, named: str
) -> None:
    sizes = ("--n-context", "60", "--n-suffix", "8", "--windows", "4", "--json", tmp_path / "e.json")
    assert named in refused(capsys, tmp_path, "eval", "--checkpoint", lab.run, "--arms", arm, *sizes)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--n-context", "1000000", "a window of 1000064 tokens is longer than every test document"),
        ("--n-suffix", "0", "n_suffix: 0 must be at least 1"),
        ("--windows", "0", "count: 0 must be at least 1"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--split", "train", "--split"),
        ("--windows", "many", "--windows"),
        ("--source", "", "empty; give a file, a folder, a glob"),
    ],
)
def test_sizes_of_eval_out_of_range(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, named: str
) -> None:
    given = ("--checkpoint", lab.run, option, value, "--json", tmp_path / "e.json")
    assert named in refused(capsys, tmp_path, "eval", *given)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def replace_by_foreign(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(3)}, "epoch": 1}, path)


def replace_by_trap(path: Path) -> None:
    torch.save({"state_dict": {}, "simba_lab_model": Trap(path.with_name("sprung"))}, path)


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap(path.with_name("sprung"))))


@pytest.mark.parametrize("command", ["eval", "fit", "test"])
@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (truncate, "is truncated or not a checkpoint"),
        (replace_by_foreign, "was not written by simba_lab"),
        (replace_by_trap, "could execute code"),
        (replace_by_pickle, "could execute code"),
        (Path.unlink, "does not exist"),
    ],
)
def test_a_checkpoint_that_must_not_be_loaded(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, spoil: Callable[[Path], Any],
    named: str,
) -> None:  # fmt: skip
    shutil.copytree(lab.run, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    spoil(checkpoint)
    if command == "eval":
        arguments: tuple[str | Path, ...] = ("--checkpoint", checkpoint)
    else:
        config = lab.experiment(tmp_path / "experiment.yaml", {"trainer.default_root_dir": str(tmp_path / "run")})
        arguments = ("--config", config, "--ckpt_path", checkpoint)
    message = refused(capsys, tmp_path, command, *arguments)
    assert named in message and str(checkpoint) in message
    assert not checkpoint.with_name("sprung").exists()


def test_a_checkpoint_without_its_config_is_refused(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(lab.run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    assert "has no config.yaml" in refused(capsys, tmp_path, "eval", "--checkpoint", tmp_path / "run")


def test_measuring_the_newest_checkpoint_needs_one(
    lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the untrained weights would be measured."""
    config = lab.experiment(tmp_path / "experiment.yaml")
    assert "last.ckpt does not exist" in refused(capsys, tmp_path, "test", "--config", config, "--ckpt_path", "last")
