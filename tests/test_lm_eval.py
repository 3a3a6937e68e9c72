"""Tasks from local text, model arguments, and whole evaluations through the harness, without a network."""

from __future__ import annotations

import argparse
import json
import math
import random
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from simba_lab.checkpoint import save_model
from simba_lab.cli import tasks as tasks_command
from simba_lab.cli.main import main
from simba_lab.data import TextData
from simba_lab.errors import InputError
from simba_lab.evaluate.harness import SimbaLabLM, register
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.tasks import CONTINUATION, PERPLEXITY
from simba_lab.tasks import build_heldout as build_tasks

WORDS = "river stone light märz window paper garden winter engine letter music bridge candle mirror".split()


def novel(seed: int) -> str:
    generator = random.Random(seed)
    return f"Book {seed}: " + " ".join(generator.choice(WORDS) for _ in range(120))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    folder = tmp_path_factory.mktemp("library")
    for seed in range(16):
        (folder / f"{seed}.txt").write_text(novel(seed), encoding="utf-8")
    return TextData(str(folder), test_share=0.5, vocab_size=300, cache_dir=str(folder / ".cache"))


@pytest.fixture(scope="module")
def tasks(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    sizes = build_tasks(folder, data, count=12, n_context=48, n_choice=6, documents=3, document_tokens=60)
    assert sizes == {CONTINUATION: 12, PERPLEXITY: 3}
    return folder


@pytest.fixture(scope="module")
def run_folder(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data.tokenizer.save(folder / "tokenizer.json")
    model = LanguageModel(ModelConfig(d_model=16, n_layer=3, vocab_size=data.vocab_size, d_state=4), seed=1)
    save_model(folder, model)
    save_model(folder / "pruned", model.sparsified("norm", "geometric", final_keep=0.2, protect_recent=0.25))
    data.tokenizer.save(folder / "pruned" / "tokenizer.json")
    return folder


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The datasets library keeps its tables below the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def items(tasks: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_right_choice_follows_the_context_and_the_others_are_from_elsewhere(data: TextData, tasks: Path) -> None:
    texts = data.shard("test").texts(data.tokenizer)
    for item in items(tasks, CONTINUATION):
        (home,) = [text for text in texts if item["context"] + item["choices"][item["answer"]] in text]
        assert len(set(item["choices"])) == 4
        for choice in item["choices"]:
            assert choice[0].isspace() and any(choice in text for text in texts)
        tokens = data.tokenizer.encode(item["context"] + item["choices"][item["answer"]])
        assert len(tokens) == 48 + 6
        assert home.startswith("Book")
    assert len({item["answer"] for item in items(tasks, CONTINUATION)}) > 1


def test_the_same_seed_builds_the_same_tasks(data: TextData, tasks: Path, tmp_path: Path) -> None:
    def built(seed: int) -> list[dict[str, Any]]:
        build_tasks(tmp_path, data, "test", 12, 48, 6, 3, 60, seed)
        return items(tmp_path, CONTINUATION)

    assert built(0) == items(tasks, CONTINUATION)
    assert built(1) != items(tasks, CONTINUATION)


def test_too_little_text_is_refused(data: TextData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="4 choices need passages of as many documents"):
        build_tasks(tmp_path, data, count=3, n_context=48, n_choice=6, documents=3, document_tokens=60)
    with pytest.raises(InputError, match="no document of the test split has 9999 tokens"):
        build_tasks(tmp_path, data, count=12, n_context=48, n_choice=6, documents=3, document_tokens=9999)
    assert not list(tmp_path.iterdir())


def test_the_command_builds_from_an_experiment_file(data: TextData, tmp_path: Path) -> None:
    settings = {"source": data.settings.source, "test_share": 0.5, "vocab_size": 300, "cache_dir": str(tmp_path / "c")}
    config = {
        "model": {"model": {"d_model": 16, "n_layer": 2}},
        "data": {"class_path": "simba_lab.data.TextData", "init_args": settings},
        "trainer": {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    parser = argparse.ArgumentParser()
    tasks_command.configure(parser)
    command = ["build", "heldout", "--config", str(tmp_path / "base.yaml"), "--out", str(tmp_path / "out")]
    sizes = ["--count", "12", "--n-context", "48", "--n-choice", "6", "--documents", "3", "--document-tokens", "60"]
    result = tasks_command.run(parser.parse_args(command + sizes))
    assert result["items"] == {CONTINUATION: 12, PERPLEXITY: 3}
    task = yaml.safe_load(Path(result["files"][CONTINUATION]).read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_absolute()
    with pytest.raises(InputError, match="--n-choice must be at least 1, got 0"):
        tasks_command.run(parser.parse_args([*command, "--n-choice", "0"]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, None),
        ({"mean_keep": 0.6}, "linear:global_impact"),
        ({"criterion": "norm", "schedule": "uniform", "keep": 0.3}, "uniform:norm"),
        ({"criterion": "global_impact", "reduce": "l2", "final_keep": 0.3}, "linear:global_impact"),
    ],
)
def test_scalars_make_an_arm(run_folder: Path, arguments: dict[str, Any], name: str | None) -> None:
    plan = SimbaLabLM(str(run_folder), device="cpu", **arguments).model.pruning
    assert name == (plan and plan.name)
    for part, key in (("criterion", "reduce"), ("schedule", "keep"), ("schedule", "final_keep")):
        if key in arguments:
            assert getattr(getattr(plan, part), key) == arguments[key]


def test_saved_pruning_stays_unless_it_is_overridden(run_folder: Path) -> None:
    def plan(**arguments: Any) -> dict[str, Any] | None:
        pruning = SimbaLabLM(pretrained=str(run_folder / "pruned"), device="cpu", **arguments).model.pruning
        return pruning and pruning.spec()

    saved = plan()
    assert (saved["criterion"]["class_path"], saved["schedule"]["init_args"]["final_keep"]) == ("norm", 0.2)
    assert plan(criterion="recency") == saved | {"criterion": {"class_path": "recency", "init_args": {}}}
    assert plan(final_keep=0.4)["schedule"]["init_args"]["final_keep"] == 0.4
    assert plan(final_keep=0.4)["protect_recent"] == 0.25
    assert plan(dense=True) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_kep": 0.5}, "model_args: unknown 'mean_kep'; use checkpoint, criterion, .*schedule linear: final_keep"),
        ({"criterion": "globl_impact", "mean_keep": 0.6}, "did you mean global_impact"),
        ({"criterion": "norm"}, "final_keep is not set"),
        ({"mean_keep": "half"}, "mean_keep must be a number, got 'half'"),
        ({"mean_keep": 1.5}, r"mean_keep must lie in \(0, 1\]"),
        ({"dense": True, "mean_keep": 0.6}, "dense=True prunes nothing"),
        ({"batch_size": "many"}, "batch_size must be an integer of at least 1, or auto"),
        ({"device": "toaster"}, "'toaster' is no device"),
        ({"max_length": 0}, "max_length must be an integer of at least 2"),
        ({"n_suffix": 64, "max_length": 64}, "n_suffix 64 must be below max_length 64"),
        ({"backend": "fast"}, "backend: 'fast' is unknown"),
    ],
)
def test_wrong_model_arguments_are_named(run_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SimbaLabLM(str(run_folder), **{"device": "cpu"} | arguments)


def test_a_checkpoint_is_required_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checkpoint is required"):
        SimbaLabLM()
    with pytest.raises(InputError, match="does not exist"):
        SimbaLabLM(str(tmp_path / "nowhere"))


def test_automatic_batch_size(run_folder: Path) -> None:
    sizes = [("auto", None, 8), ("auto:4", 2, 2), ("32", None, 32), (16, 8, 8)]
    for asked, most, expected in sizes:
        assert SimbaLabLM(str(run_folder), batch_size=asked, max_batch_size=most).batch_size == expected


def evaluate(tasks: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [CONTINUATION, PERPLEXITY]
    return simple_evaluate(tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def test_simple_evaluate_by_name(run_folder: Path, data: TextData, tasks: Path) -> None:
    register()
    arguments = f"checkpoint={run_folder},criterion=global_impact,mean_keep=0.6,max_length=40,n_suffix=8"
    found = evaluate(tasks, model="simba_lab", model_args=arguments, device="cpu", batch_size=4)
    lm = SimbaLabLM(str(run_folder), "global_impact", mean_keep=0.6, max_length=40, n_suffix=8, device="cpu")
    right = []
    for sample, item in zip(found["samples"][CONTINUATION], items(tasks, CONTINUATION), strict=True):
        assert [tuple(pair) for pair in sample["arguments"]] == [(item["context"], c) for c in item["choices"]]
        likelihoods = [response[0] for (response,) in sample["resps"]]
        right.append(likelihoods.index(max(likelihoods)) == item["answer"])
    assert found["results"][CONTINUATION]["acc,none"] == pytest.approx(sum(right) / 12)
    texts = [item["text"] for item in items(tasks, PERPLEXITY)]
    nats = sum(answer for sample in found["samples"][PERPLEXITY] for (answer,) in sample["resps"])
    bits = -nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"][PERPLEXITY]["bits_per_byte,none"] == pytest.approx(bits)
    record = found["config"]["simba_lab"]
    assert record["arm"] == "linear:global_impact"
    assert record["requests_computed"] == {"loglikelihood": 48, "loglikelihood_rolling": 3}
    assert record["flops"] == sum(record["flops_by_op"].values()) > lm.model.flops(33, 0).total * 12
    assert record["fingerprint"] == lm.fingerprint


def test_simple_evaluate_with_an_object_reuses_only_its_own_answers(
    run_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")

    def scores(**arm: Any) -> tuple[float, int]:
        lm = SimbaLabLM(str(run_folder), device="cpu", max_length=40, n_suffix=8, **arm)
        found = evaluate(tasks, model=lm, use_cache=cache)
        return found["results"][PERPLEXITY]["bits_per_byte,none"], found["config"]["simba_lab"]["flops"]

    dense, pruned = scores(), scores(mean_keep=0.55)
    assert dense[0] != pruned[0]
    assert dense[1] > 0 and pruned[1] > 0
    assert scores() == (dense[0], 0)
    assert scores(mean_keep=0.55) == (pruned[0], 0)


@pytest.fixture
def without_stock_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the thousands of task files of the harness takes it many seconds and tests nothing of ours."""
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__

    def only_ours(self: Any, *args: Any, **options: Any) -> None:
        whole(self, *args, **options, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", only_ours)


def command(tasks: Path, model_args: str, task: str = CONTINUATION) -> list[str]:
    chosen = ["--include_path", str(tasks), "--tasks", task, "--batch_size", "4", "--device", "cpu"]
    return ["lm-eval", "run", "--model", "simba_lab", "--model_args", model_args, *chosen]


@pytest.mark.usefixtures("without_stock_tasks")
def test_the_harness_command_line(
    run_folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"checkpoint={run_folder},criterion=global_impact,schedule=linear,mean_keep=0.55"
    assert main([*command(tasks, arguments), "--output_path", str(tmp_path / "found.json")]) == 0
    assert CONTINUATION in capsys.readouterr().out
    (written,) = tmp_path.glob("found_*.json")
    found = json.loads(written.read_text())
    assert found["results"][CONTINUATION]["sample_len"] == 12
    assert found["config"]["simba_lab"]["pruning"]["schedule"]["init_args"]["final_keep"] == pytest.approx(0.1)


@pytest.mark.usefixtures("without_stock_tasks")
@pytest.mark.parametrize(
    ("model_args", "task", "message"),
    [
        ("mean_kep=0.5", CONTINUATION, "model_args: unknown 'mean_kep'"),
        (
            "mean_keep=0.55",
            "simba_lab_kontinuation",
            "--tasks: 'simba_lab_kontinuation' is unknown, near it: simba_lab_continuation",
        ),
    ],
)
def test_mistakes_on_the_command_line_take_one_line_and_exit_2(
    run_folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str], model_args: str, task: str, message: str
) -> None:
    assert main(command(tasks, f"checkpoint={run_folder},{model_args}", task)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("simba-lab: error:")]
    assert message in line


def test_the_harness_keeps_its_own_exit_codes_and_our_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    before = list(sys.argv)
    assert main(["lm-eval", "run", "--no-such-flag"]) == 2
    assert main(["lm-eval", "run", "--help"]) == 0
    assert "--model_args" in capsys.readouterr().out
    assert sys.argv == before


@pytest.mark.usefixtures("without_stock_tasks")
def test_a_task_that_needs_a_network_names_its_offline_twin(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    # As HF_HUB_OFFLINE=1 does, so that nobody waits for a network.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    online = {"task": "hellaswag", "dataset_path": "Rowan/hellaswag", "test_split": "validation"}
    (tmp_path / "hellaswag.yaml").write_text(yaml.safe_dump(online | {"doc_to_text": "x", "doc_to_target": "y"}))
    assert main(command(tmp_path, f"checkpoint={run_folder}", "hellaswag")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("simba-lab: error:")]
    assert "the documents of hellaswag need the network" in line
    assert line.endswith("without one use simba_lab_hellaswag for hellaswag")


def test_our_entry_point_leads_the_harness_to_our_model() -> None:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import Registry

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    # As versions of the harness do that look for plug-ins.
    models = Registry("model", base_cls=LM)
    models.register(name, target=EntryPoint(name, value, "lm_eval.models"))
    assert (name, models.get(name)) == ("simba_lab", SimbaLabLM)
