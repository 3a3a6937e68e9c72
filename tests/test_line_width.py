"""The six benchmarks in the line width of a model: the same words, other lines, and never one for the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from hypothesis import given
from hypothesis import strategies as st

from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.scores import main_metric
from simba_lab.evaluate.benchmarks.tasks import load_tasks
from simba_lab.tasks import PAPER6, ensure_paper6, even_samples, find_benchmark, in_width, offline, offline_manager
from simba_lab.tasks.lines import wrap_request
from simba_lab.tasks.task_files import write_documents, write_task

WIDTH = 70
SIX = {benchmark.name for benchmark in PAPER6}
spaced_text = st.text(st.sampled_from("ab-  \n\t"), max_size=60)


@pytest.fixture(scope="module", autouse=True)
def _no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables of the datasets library and tasks built by the way go below the tests' folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAMBADA, ARC-Easy, PIQA and WinoGrande as published and in lines of 70: a last word, choices, two contexts."""
    few = tuple(find_benchmark(name) for name in ("lambada_openai", "arc_easy", "piqa", "winogrande"))
    built = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "PAPER6", few)
        homes = [ensure_paper6(built, width) for width in (None, WIDTH)]
    assert [home.name for home in homes] == ["paper6", "paper6_width70"]
    return built


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Any]:
    manager = offline_manager([folder])
    return manager.load("paper6")["tasks"] | manager.load("paper6_width70")["tasks"]


def asked(task: Any, count: int = 60) -> list[tuple[str, str]]:
    chosen = even_samples({"it": len(task.eval_docs)}, count)["it"]
    task.build_all_requests(samples=chosen, rank=0, world_size=1)
    return [request.args for request in task.instances]


@pytest.mark.parametrize("name", ["lambada_openai", "arc_easy", "piqa", "winogrande"])
def test_only_white_space_differs(loaded: dict[str, Any], name: str) -> None:
    published, wrapped = (loaded[in_width(f"simba_lab_{name}", width)] for width in (None, WIDTH))
    before, after = asked(published), asked(wrapped)
    assert len(before) == len(after) >= 60
    for (context, continuation), (lines, scored) in zip(before, after, strict=True):
        assert (lines.split(), scored.split()) == (context.split(), continuation.split())
        assert scored.lstrip() == continuation.lstrip() and len(scored) == len(continuation)
        assert max(map(len, lines.split("\n"))) <= WIDTH
    assert any("\n" in lines for (lines, _) in after)
    assert published.config.metric_list == wrapped.config.metric_list
    document, answers = published.eval_docs[0], [(-float(number), False) for number in range(len(before))]
    given_answers = answers[: len([one for one in published.instances if one.doc_id == published.instances[0].doc_id])]
    assert published.process_results(document, given_answers) == wrapped.process_results(document, given_answers)


def test_a_last_word_follows_a_break_where_it_would_leave_the_line(loaded: dict[str, Any]) -> None:
    broken = 0
    for context, word in asked(loaded["simba_lab_lambada_openai_width70"], 300):
        column = len(context.rpartition("\n")[2])
        assert word[0] == ("\n" if column + len(word) > WIDTH else " ")
        broken += word[0] == "\n"
    # A word and its space take some 6.5 of 70 columns, and begin anywhere in them.
    assert 0.03 < broken / 300 < 0.2


def test_choices_share_their_context(loaded: dict[str, Any]) -> None:
    contexts = [context for context, _ in asked(loaded["simba_lab_piqa_width70"], 40)]
    assert contexts[::2] == contexts[1::2] and len(set(contexts)) == 40


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("one two", " six", ("one two", "\nsix")),
        ("one two", " si", ("one two", " si")),
        ("one two three", " of four or more", ("one two\nthree", " of four or more")),
        ("one two three", " seventeen", ("one two\nthree", "\nseventeen")),
        ("Question: one\nAnswer:", " a", ("Question:\none\nAnswer:", " a")),
        ("one two ", "six", ("one two\n", "six")),
        ("one two", "six", ("one two", "six")),
        ("one two\n", "threefold", ("one two\n", "threefold")),
        ("", " threefoldness", ("", " threefoldness")),
        ("incomprehensible", " a", ("incomprehensible", "\na")),
        ("a well-known one", " b", ("a\nwell-known\none", " b")),
    ],
)
def test_where_lines_break(context: str, continuation: str, expected: tuple[str, str]) -> None:
    assert wrap_request(context, continuation, 10) == expected


@given(spaced_text, spaced_text, st.integers(1, 30))
def test_words_never_change(context: str, continuation: str, width: int) -> None:
    lines, scored = wrap_request(context, continuation, width)
    assert lines.split() == context.split()
    assert (lines + scored).split() == (context + continuation).split()
    assert scored.lstrip() == continuation.lstrip()
    longest = max(map(len, (context + continuation).split()), default=0)
    body = lines.rstrip().lstrip(" \t")
    assert max(map(len, body.split("\n"))) <= max(width, longest, len(lines) - len(lines.lstrip()) + longest)


def test_a_width_names_its_tasks_and_says_so(folder: Path) -> None:
    """A task differs from the published one by its names, the class that wraps, and the width in its metadata."""
    more = {"class: !function 'simba_lab.tasks.wrapped_task.WrappedTask'", f"  line_width: {WIDTH}"}
    for name, added in (("simba_lab_piqa", more), ("paper6", {f"  line_width: {WIDTH}"})):
        files = [folder / f"paper6{end}" / f"{name}{end}.yaml" for end in ("", "_width70")]
        published, wide = (file.read_text().replace("_width70", "").splitlines() for file in files)
        assert [line for line in wide if line not in added] == published
        assert not added & set(published) and added <= set(wide)
        documents = [file.with_suffix(".jsonl") for file in files]
        assert name == "paper6" or documents[0].read_bytes() == documents[1].read_bytes()


def test_results_name_the_width_and_are_not_compared_with_another(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny.lab(tmp_path_factory.getbasetemp()).run
    command = ("eval", "--checkpoint", run, "--tasks", "simba_lab_lambada_openai", "--arms", "dense", "--device", "cpu")
    given = ("--limit", "3", "--out", tmp_path / "o")
    assert tiny.simba_lab(*command, *given) == 0
    assert tiny.simba_lab(*command, *given, "--line-width", str(WIDTH)) == 0
    plain, wide = tmp_path / "o" / "results.json", tmp_path / "o" / "width70" / "results.json"
    assert [json.loads(file.read_text())["line_width"] for file in (plain, wide)] == [None, WIDTH]
    assert [len(list((file.parent / "answers").iterdir())) for file in (plain, wide)] == [1, 1]
    refused = tiny.mistake(capsys, "eval", "--compare", plain, wide)
    assert "was scored on simba_lab_lambada_openai_width70" in refused and "only the same tasks" in refused


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("eval", "--tasks", "paper6", "--line-width", "-1"), "line width: at least 1 character, got -1"),
        (("eval", "--line-width", "70"), "--line-width means nothing beside an evaluation on windows"),
        (("tasks", "build", "--line-width", "-70"), "line width: at least 1 character, got -70"),
        (("tasks", "build", "--line-width", "70", "recall"), "--line-width is for paper6; recall is made of a text"),
    ],
)
def test_mistakes_are_named(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], command: tuple[str, ...], named: str
) -> None:
    run = tiny.lab(tmp_path_factory.getbasetemp()).run
    more = ("--checkpoint", run, "--arms", "dense") if command[0] == "eval" else ()
    assert named in tiny.mistake(capsys, *command, *more)


def test_a_file_is_refused_beside_another_width(folder: Path) -> None:
    plain, wide = (str(folder / f"paper6{end}" / f"simba_lab_piqa{end}.yaml") for end in ("", "_width70"))
    assert list(load_tasks([wide], folder, line_width=WIDTH)) == ["simba_lab_piqa_width70"]
    with pytest.raises(InputError, match="simba_lab_piqa_width70 is in width 70, not as published"):
        load_tasks([wide], folder)
    with pytest.raises(InputError, match="simba_lab_piqa_width70 is in width 70, not in width 60"):
        load_tasks([wide], folder, line_width=60)
    with pytest.raises(InputError, match="simba_lab_piqa is as published, not in width 70; paper6 and its tasks come"):
        load_tasks([plain], folder, line_width=WIDTH)


def test_a_text_that_is_written_has_no_lines_to_break(tmp_path: Path) -> None:
    settings = yaml.safe_load("{output_type: loglikelihood_rolling, doc_to_text: '', doc_to_target: '{{text}}'}")
    maker = {"class": offline.Function("simba_lab.tasks.wrapped_task.WrappedTask")}
    write_documents(tmp_path / "texts.jsonl", [{"text": "one two"}])
    write_task(tmp_path, "texts", settings | maker, {"line_width": WIDTH}, tmp_path / "texts.jsonl")
    with pytest.raises(InputError, match="texts: line_width is for tasks that score continuations"):
        offline_manager([tmp_path]).load("texts")


def test_the_customary_metric_is_that_of_the_benchmark_in_any_width() -> None:
    found = {name: main_metric(in_width(f"simba_lab_{name}", WIDTH), ["perplexity", "acc", "acc_norm"]) for name in SIX}
    customary = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "lambada_openai": "acc"}
    assert found == dict.fromkeys(SIX, "perplexity") | customary
