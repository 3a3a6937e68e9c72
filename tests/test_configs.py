"""Every shipped YAML file: it parses, plans, runs two steps, and an unknown key anywhere in it is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from simba_lab.budget.arms import TrainedArm
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import PruningPlan
from simba_lab.sweep import read_sweep
from simba_lab.sweep.plan import SweepPlan, make_plan
from simba_lab.training import Experiment, read_experiment
from simba_lab.training.lightning_cli import run_cli

ROOT = Path(__file__).parents[1]
# Finished runs beside the text they are measured on, which no fit takes; in their folders lies how they were trained.
MEASURED = sorted(ROOT.glob("experiments/shipped/*.yaml"))
EXPERIMENTS = sorted({*ROOT.glob("experiments/**/*.yaml")} - {*ROOT.glob("experiments/shipped/**/*.yaml")})
SWEEPS = sorted(ROOT.glob("sweeps/**/*.yaml"))
SMALL = {
    "model.model.d_model": 16, "model.model.n_layer": 2, "model.model.d_state": 4, "trainer.accelerator": "cpu",
    "trainer.max_steps": 2, "trainer.val_check_interval": 1, "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1, "checkpoint.every_n_steps": 1, "trainer.devices": 1, "trainer.strategy": "auto",
    "trainer.accumulate_grad_batches": 1,
}  # fmt: skip


def by_name(path: Path) -> str:
    return path.stem


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def sections(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every mapping whose keys the schema fixes: options of criteria and schedules are their classes' own."""
    if isinstance(values, dict) and not {"criterion", "schedule"} & set(place):
        yield place
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from sections(value, (*place, key))


def test_there_is_something_to_test() -> None:
    assert {"base", "small", "recall", "fsdp-2.8b"} <= {path.stem for path in EXPERIMENTS}
    assert {"from_nothing", "hierarchy_ablation", "keep_curve"} <= {path.stem for path in SWEEPS}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=by_name)
def test_an_experiment_runs_two_steps(path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lab = tiny.lab(tmp_path_factory.getbasetemp())
    given = SMALL | {"trainer.default_root_dir": tmp_path / "run"}
    if read(path)["data"]["class_path"].endswith(("TextData", "DrillData")):
        length = 40 if read(path)["data"]["class_path"].endswith("TextData") else 150
        given |= {"data.source": lab.text, "data.vocab_size": 300, "data.length": length, "data.cache_dir": lab.cache}
        given |= {"data.num_workers": 0}
        # The ladder's books are not part of the project, and a CPU trains in fp32.
        given |= {"data.validation_source": "null", "data.test_source": "null", "trainer.precision": "32-true"}
        given["data.tokenizer"] = "bpe"
    else:
        given |= {"data.train_examples": 128, "data.validation_examples": 4}
    if read(path)["model"]["model"].get("layer") == "mamba2":
        given["model.model.headdim"] = 8
    if "weights" in read(path)["model"]:
        given["model.weights"] = "null"
    if "pruning" in read(path)["model"]:
        given["model.pruning.n_context"] = 24
    arguments = [f"--{key}={value}" for key, value in given.items()]
    assert tiny.simba_lab("fit", "--config", path, *arguments) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["step"] == 2
    resolved = read(tmp_path / "run" / "config.yaml")
    for key in ("learning_rate", "weight_decay", "warmup_steps"):
        assert resolved["model"][key] == read(path)["model"][key]
    assert resolved["data"]["init_args"]["batch_size"] == read(path)["data"]["init_args"]["batch_size"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=by_name)
def test_an_unknown_key_anywhere_in_an_experiment_is_named(path: Path, tmp_path: Path) -> None:
    for place in sections(read(path)):
        spoilt = tiny.write_yaml(tmp_path / "spoilt.yaml", read(path), {".".join((*place, "unknwon")): 1})
        with pytest.raises(InputError, match="unknwon"):
            run_cli(["--config", str(spoilt)], run=False)
    assert not (tmp_path / "runs").exists()


def training_flops(values: dict[str, Any]) -> int:
    """Of a whole fit, in closed form."""
    model, data = values["model"], values["data"]["init_args"]
    shape = ModelConfig(**model["model"], vocab_size=data["vocab_size"])
    pruning = dict(model.get("pruning") or {"n_context": data["length"]})
    n_context = pruning.pop("n_context")
    plan = PruningPlan.build(shape.n_layer, **pruning) if pruning else None
    steps, head = values["trainer"]["max_steps"], "scored" if plan else "all"
    fit = TrainedArm(
        "fit", shape, n_context, data["length"] - n_context, plan, head, "suffix", steps, data["batch_size"]
    )
    return fit.flops


@pytest.mark.parametrize("path", [path for path in EXPERIMENTS if {"tuned", "pruned"} & {*by_name(path).split("-")}])
def test_a_rung_trained_otherwise_costs_what_the_claim_says(path: Path) -> None:
    """From nothing as much as the dense rung; tuned, a twentieth of it, from that rung's weights."""
    values, rung = read(path), read(path.with_name(f"{path.stem.partition('-')[0]}.yaml"))
    tuned = "tuned" in path.stem
    assert training_flops(values) == pytest.approx(training_flops(rung) * (0.05 if tuned else 1), rel=0.002)
    assert (values["data"], values["model"]["model"]) == (rung["data"], rung["model"]["model"])
    assert values["model"].get("weights") == (rung["trainer"]["default_root_dir"] if tuned else None)
    assert values["trainer"]["default_root_dir"] == f"runs/ladder/{path.stem}"


@pytest.mark.parametrize("path", MEASURED, ids=by_name)
def test_an_unknown_key_beside_a_finished_run_is_named(path: Path, tmp_path: Path) -> None:
    for place in sections(read(path)):
        spoilt = tiny.write_yaml(tmp_path / "spoilt.yaml", read(path), {".".join((*place, "unknwon")): 1})
        with pytest.raises(InputError, match="unknwon"):
            read_experiment(spoilt)


@pytest.mark.parametrize("path", SWEEPS, ids=by_name)
def test_an_unknown_key_anywhere_in_a_sweep_is_named(path: Path, tmp_path: Path) -> None:
    extra = {"statistics": {"resamples": 100}, "search": {"trials": 3}}
    places = list(sections(read(path) | extra))
    assert len(places) > 5
    for place in places:
        values = read(path) | extra
        inner = values
        for key in place:
            inner = inner[key]
        inner["unknwon"] = 1
        with pytest.raises(InputError, match=r"unknwon is not a key.*; keys here: "):
            read_sweep(tiny.write_yaml(tmp_path / "spoilt.yaml", values))


def plan_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepPlan:
    """The plan of a shipped sweep at its real shapes; the vocabulary is taken as large as the file asks for."""
    monkeypatch.chdir(ROOT)
    config = read_sweep(path)

    def described(name: str) -> Experiment:
        # A shipped run is a rung of the ladder; where its weights are not here, that rung's file knows its shape.
        place = ROOT / name
        values = read(ROOT / "experiments" / "ladder" / place.name if place in MEASURED else place)
        shape = ModelConfig(**values["model"]["model"], vocab_size=values["data"]["init_args"]["vocab_size"])
        with torch.device("meta"):
            model = LanguageModel(shape, seed=None)
        return Experiment(Path(name), Path(values["trainer"]["default_root_dir"]), model, None, values, None)

    others = {arm.experiment: described(arm.experiment) for arm in config.arms if arm.experiment}
    return make_plan(config, described(config.experiment), others)


@pytest.mark.parametrize("path", SWEEPS, ids=by_name)
def test_a_sweep_plans_every_arm_within_its_tolerance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(path, monkeypatch)
    tolerance = 0.016 if path.stem == "pair_512" else 0.005  # said in that file
    assert plan.budget.tolerance == tolerance
    dense = next(arm for arm in plan.arms if arm.kind == "dense")
    assert plan.budget.flops < 0.9 * dense.arm.flops
    for arm in plan.arms:
        if arm.matched:
            assert abs(arm.arm.flops / plan.budget.flops - 1) <= tolerance, arm.name
        if arm.kind == "pruned":
            assert arm.arm.keep_counts[-1] < arm.arm.n_context
    kinds = {arm.kind for arm in plan.arms}
    assert {"dense", "shorter_context"} <= kinds
    # A budget between two models has no dense model of that cost.
    assert "smaller_dense" in kinds or plan.budget.reference.endswith("% of the arm dense")


def test_the_default_ablation_compares_the_paper_s_setting_with_every_control(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(ROOT / "sweeps" / "hierarchy_ablation.yaml", monkeypatch)
    names = {arm.name for arm in plan.arms}
    criteria = ("global_impact", "local_delta", "norm", "random", "recency")
    assert names >= {"dense_4m", "shorter_context", "dense"} | {f"linear:{criterion}" for criterion in criteria}
    assert names >= {f"{schedule}:global_impact" for schedule in ("uniform", "highway_top")} | {"uniform:random"}
    assert "look_ahead" in names
    assert sum(arm.plan is not None and arm.plan.convolution == "adjacent" for arm in plan.arms) == 4
    assert plan.arms[0].name == "dense_4m" and plan.budget.reference == "the arm dense_4m"
    # Two cores do about 0.17 TFLOPs a second: within ten minutes, with as much again to spare.
    windows = read_sweep(ROOT / "sweeps" / "hierarchy_ablation.yaml").windows
    assert windows >= 250 and sum(arm.arm.flops for arm in plan.arms) * windows < 50e12


def test_the_ablation_from_nothing_crosses_schedules_with_criteria(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(ROOT / "sweeps" / "from_nothing.yaml", monkeypatch)
    criteria = ["global_impact", "local_delta", "norm", "random", "random(seed=1)", "random(seed=2)", "recency"]
    crossed = {f"{schedule}:{name}" for schedule in ("uniform", "linear", "highway_top") for name in criteria}
    assert {arm.name for arm in plan.arms} == crossed | {"dense_small", "shorter_context", "dense"}
    assert plan.arms[0].name == "dense_small" and plan.budget.reference == "the arm dense_small"


ALIKE = ("choice_12m", "claim_12m", "pair", "pair_512", "shorter", "tuned36", "curve")
"""Sweeps that differ from another in what was planned alone: they are planned above, not run here."""


@pytest.mark.parametrize("path", [path for path in SWEEPS if path.stem not in ALIKE], ids=by_name)
def test_a_sweep_runs_on_tiny_experiments(
    path: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file as it is, but for sizes, on experiments of the same names."""
    lab = tiny.lab(tmp_path_factory.getbasetemp())
    twins = {read(path)["experiment"]: "base"}
    for arm in read(path)["arms"]:
        if "experiment" in arm:
            twins[arm["experiment"]] = "small" if arm.get("kind") == "smaller_dense" else "base"
    for name, twin in twins.items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((lab.folder / f"{twin}.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    sizes = {"windows": 3, "n_context": 96, "n_suffix": 16, "budget.tolerance": 0.02, "statistics.resamples": 100}
    if "search" in read(path):
        sizes |= {"search.windows": 3, "search.trials": 2}
    if "recall" in read(path):
        sizes["recall.distance"] = 20
    if read(path)["budget"].get("share", 1) < 0.5:  # of a tiny model the head, which nothing prunes, is a larger part
        sizes["budget.share"] = 0.6
    overrides = [part for key, value in sizes.items() for part in ("--set", f"{key}={value}")]
    assert tiny.simba_lab("sweep", "--config", path, *overrides) == 0
    folder = tmp_path / "runs" / "sweeps" / path.stem
    arms = json.loads((folder / "results.json").read_text())["arms"]
    assert len(arms) == len(plan_of(path, monkeypatch).arms) + ("search" in read(path))
    assert (folder / "report.html").stat().st_size > 10_000
