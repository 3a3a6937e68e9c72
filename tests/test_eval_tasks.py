"""``simba-lab eval --tasks``: arms over tasks of the harness equal what is computed by hand, pair by pair."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import simba_lab
from simba_lab.cli import eval_views
from simba_lab.cli.eval_tasks import checkpoint_name, read_limit
from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.arguments import read_device
from simba_lab.evaluate.arms import parse_arm
from simba_lab.evaluate.benchmarks.compare import average_cell, cell, compare
from simba_lab.evaluate.benchmarks.run import BenchmarkArm, without_bars
from simba_lab.evaluate.benchmarks.scores import NATS, NUMBER, SHARE, Cost, Metric, TaskScores, main_metric, read_metric
from simba_lab.evaluate.benchmarks.store import ArmScores, read_results
from simba_lab.evaluate.likelihood import score_pairs
from simba_lab.evaluate.scoring import encode_pair
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.tasks import even_samples
from simba_lab.tasks.task_files import mean_metric, write_documents, write_task

PRUNED = "linear:global_impact@0.6"
WORDS = "import return class while print raise yield assert lambda global except finally".split()
LIMIT, SIZE = 7, 20


def quiz_documents(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    documents = []
    for number in range(count):
        drawn = generator.choice(WORDS, 19).tolist()
        context, choices = " ".join(drawn[:15]), [" ".join(drawn[15 : 16 + place]) for place in range(4)]
        documents.append({"context": context, "choices": choices, "answer": number % 4})
    return documents


def write_quiz(folder: Path, documents: list[dict[str, Any]]) -> None:
    settings = {
        "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [mean_metric("acc"), mean_metric("acc_norm")],
    }  # fmt: skip
    write_documents(folder / "quiz.jsonl", documents)
    write_task(folder, "quiz", settings, {}, folder / "quiz.jsonl")


def write_last_word(folder: Path, documents: list[dict[str, Any]]) -> None:
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    settings = {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": " {{choices[0]}}",
        "metric_list": [perplexity, mean_metric("acc")],
    }  # fmt: skip
    write_documents(folder / "last.jsonl", documents)
    write_task(folder, "lambada_openai", settings, {}, folder / "last.jsonl")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quizzes")
    write_quiz(folder, quiz_documents(SIZE))
    write_last_word(folder, quiz_documents(SIZE))
    return folder


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is left in the user's folders."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def evaluation(checkpoint: Path, tasks: Path | str, arms: str, out: Path, *more: str) -> dict[str, Any]:
    """The result file of an evaluation that must succeed."""
    given = ("--checkpoint", checkpoint, "--tasks", tasks, "--arms", arms, "--out", out, "--device", "cpu")
    limit = () if "--limit" in more else ("--limit", str(LIMIT))
    assert tiny.simba_lab("eval", *given, *limit, *more, "--json", out.with_suffix(".json")) == 0
    return json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def result(lab: tiny.Lab, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluation(lab.run, tasks, f"dense,{PRUNED}", tmp_path_factory.mktemp("evaluation") / "out")


def by_hand(lab: tiny.Lab, arm: str) -> tuple[list[int], list[float], int, list[list[int]]]:
    """Answers to the quiz, log-likelihoods of the last words, FLOPs of the quiz, kept tokens of its contexts."""
    model = parse_arm(arm, simba_lab.load(lab.run))
    tokenizer = Tokenizer.load(lab.run / "tokenizer.json")
    answers, nats, flops, kept = [], [], 0, []
    for index in even_samples({"quiz": SIZE}, LIMIT)["quiz"]:
        document = quiz_documents(SIZE)[index]
        pairs = [encode_pair(tokenizer, document["context"], f" {choice}") for choice in document["choices"]]
        scores = [next(score_pairs(model, [pair], 1))[1].log_likelihood for pair in pairs]
        answers.append(int(np.argmax(scores)))
        nats.append(scores[0])
        length = len(pairs[0].context)
        once, kept = model.flops(length, 0).total, [*kept, model.keep_counts(length)]
        flops += once + sum(model.flops(length, len(pair.continuation) - 1).total - once for pair in pairs)
    return answers, nats, flops, kept


@pytest.mark.parametrize("arm", ["dense", PRUNED])
def test_scores_and_costs_equal_those_by_hand(lab: tiny.Lab, result: dict[str, Any], arm: str) -> None:
    record = next(one for one in result["arms"] if one["name"] == arm)
    answers, nats, flops, kept = by_hand(lab, arm)
    chosen = even_samples({"quiz": SIZE}, LIMIT)["quiz"]
    quiz, last = record["tasks"]["quiz"], record["tasks"]["lambada_openai"]
    assert [row["doc_id"] for row in quiz["documents"]] == chosen != list(range(LIMIT))
    right = [float(answer == index % 4) for answer, index in zip(answers, chosen, strict=True)]
    assert [row["metrics"]["acc"] for row in quiz["documents"]] == [[value, 1.0] for value in right]
    assert [row["metrics"]["perplexity"][0] for row in last["documents"]] == pytest.approx([-n for n in nats], abs=1e-4)
    assert last["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    assert quiz["cost"]["flops"] == flops
    assert quiz["cost"]["requests"] == 4 * quiz["cost"]["contexts"] == 4 * LIMIT
    assert quiz["cost"]["kept"] == pytest.approx(np.mean(kept, axis=0))
    assert record["flops"] == quiz["cost"]["flops"] + last["cost"]["flops"]
    assert record["flops_per_request"] == pytest.approx(record["flops"] / (5 * LIMIT))


def test_the_table_holds_what_the_documents_say(result: dict[str, Any]) -> None:
    dense, pruned = result["arms"]
    first, second = result["comparison"]["values"]
    assert (first["relative_flops"], second["relative_flops"]) == (1.0, pytest.approx(pruned["flops"] / dense["flops"]))
    columns = ["lambada_openai perplexity", "lambada_openai acc", "quiz acc", "average"]
    assert list(first["cells"]) == columns
    means = [np.mean([row["metrics"]["acc"][0] for row in task["documents"]]) for task in pruned["tasks"].values()]
    assert second["cells"]["average"]["value"] == pytest.approx(np.mean(means))
    differences = {(d["task"], d["metric"]): d for d in result["comparison"]["differences"]}
    assert [f"{task} {name}".replace("average average", "average") for task, name in differences] == columns
    nats = [
        [row["metrics"]["perplexity"][0] for row in arm["tasks"]["lambada_openai"]["documents"]]
        for arm in (dense, pruned)
    ]
    found = differences["lambada_openai", "perplexity"]
    assert found["difference"] == pytest.approx(np.mean(nats[1]) - np.mean(nats[0]))
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert not found["higher_is_better"]
    assert "FLOPs differ" in result["comparison"]["sentences"][0]
    assert result["environment"]["lm-eval"] and dense["weights_hash"] == pruned["weights_hash"]
    assert dense["protocol"] == "suffix" and pruned["pruning"]["criterion"]["class_path"] == "global_impact"


def test_the_closed_form_is_what_ran(lab: tiny.Lab, tasks: Path, tmp_path: Path) -> None:
    """One continuation to a context and one context at a time leave no padding."""
    given = ("--batch-size", "1", "--limit", "4")
    found = evaluation(lab.run, tasks / "lambada_openai.yaml", PRUNED, tmp_path / "o", *given)
    (arm,) = found["arms"]
    model, tokenizer = parse_arm(PRUNED, simba_lab.load(lab.run)), Tokenizer.load(lab.run / "tokenizer.json")
    chosen = even_samples({"last": SIZE}, 4)["last"]
    documents = [quiz_documents(SIZE)[index] for index in chosen]
    pairs = [encode_pair(tokenizer, row["context"], f" {row['choices'][0]}") for row in documents]
    with recording(Ledger()) as ledger:
        assert len(list(score_pairs(model, pairs, 1))) == 4
    assert arm["flops"] == ledger.total


def test_an_interrupted_evaluation_goes_on(
    lab: tiny.Lab, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any]
) -> None:
    whole, ran = BenchmarkArm.run, []

    def interrupted(self: BenchmarkArm, prepared: Any) -> TaskScores:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((self.name, prepared.name))
        return whole(self, prepared)

    monkeypatch.setattr(BenchmarkArm, "run", interrupted)
    command = ("eval", "--checkpoint", lab.run, "--tasks", tasks, "--arms", "dense", PRUNED, "--limit", str(LIMIT))
    assert tiny.simba_lab(*command, "--out", tmp_path / "o", "--device", "cpu") == 130
    assert not (tmp_path / "o" / "results.json").exists()
    ran.clear()
    found = evaluation(lab.run, tasks, f"dense,{PRUNED}", tmp_path / "o")
    assert ran == [(PRUNED, "quiz")]
    assert found["comparison"] == result["comparison"]
    assert json.loads((tmp_path / "o" / "results.json").read_text())["comparison"] == found["comparison"]
    ran.clear()
    assert evaluation(lab.folder / "runs" / "small", tasks / "quiz.yaml", "dense", tmp_path / "o") != found
    assert ran == [("dense", "quiz")], "other weights are another arm, whatever its name"
    evaluation(lab.run, tasks / "quiz.yaml", "dense", tmp_path / "o", "--limit", "5")
    assert ran[1:] == [("dense", "quiz")], "other documents are another result"


def test_files_are_compared_without_their_models(
    lab: tiny.Lab, tasks: Path, tmp_path: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, other = (tmp_path / f"{name}.json" for name in ("base", "small", "few"))
    first.write_text(json.dumps(result))
    small = lab.folder / "runs" / "small"
    found = evaluation(small, tasks, "dense", tmp_path / "small")
    assert tiny.simba_lab("eval", "--compare", first, second, "--json", tmp_path / "c.json") == 0
    compared = json.loads((tmp_path / "c.json").read_text())
    (perplexity,) = [d for d in compared["differences"] if d["metric"] == "perplexity"]
    assert (perplexity["arm"], perplexity["reference"]) == ("small dense", "base dense")
    nats = [
        np.mean([row["metrics"]["perplexity"][0] for row in one["arms"][0]["tasks"]["lambada_openai"]["documents"]])
        for one in (found, result)
    ]
    assert perplexity["difference"] == pytest.approx(nats[0] - nats[1])
    evaluation(small, tasks, "dense", tmp_path / "few", "--limit", "5")
    refused = tiny.mistake(capsys, "eval", "--compare", first, other)
    assert "few dense and base dense were scored on different documents of lambada_openai (5 and 7" in refused
    evaluation(small, tasks / "quiz.yaml", "dense", tmp_path / "few")
    assert "was scored on quiz, base dense on lambada_openai, quiz" in tiny.mistake(
        capsys, "eval", "--compare", first, other
    )
    for text in ("{}", "no json", '{"kind": "simba_lab benchmark results", "arms": [{"name": "dense"}]}'):
        other.write_text(text)
        assert f"{other} is no result file" in tiny.mistake(capsys, "eval", "--compare", first, other)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--tasks", "papr6"), "--tasks: 'papr6' is unknown; near it: paper6"),
        (("--tasks", "simba_lab_helaswag"), "near it: simba_lab_hellaswag"),
        (("--tasks", "nowhere/quiz.yaml"), "--tasks: there is no file or folder nowhere/quiz.yaml"),
        (("--tasks", "paper6", "--arms", "dense,liner:norm@0.5"), "'liner' is unknown (did you mean linear?)"),
        (("--tasks", "paper6", "--arms", "dense,dense"), "--arms: dense is given twice"),
        (("--tasks", "paper6", "--limit", "some"), "--limit must be a number of documents, or 0 or all"),
        (("--tasks", "paper6", "--windows", "5"), "--windows means nothing beside --tasks"),
        (("--limit", "5"), "--limit means nothing beside an evaluation on windows"),
        (("--compare", "a.json", "b.json"), "--checkpoint means nothing beside --compare"),
    ],
)
def test_mistakes_are_named(
    lab: tiny.Lab, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], named: str
) -> None:
    assert named in tiny.mistake(capsys, "eval", "--checkpoint", lab.run, *options)


def test_a_task_that_needs_the_network_names_its_twin(monkeypatch: pytest.MonkeyPatch, tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    from simba_lab.evaluate.benchmarks.tasks import load_tasks

    def unreachable(self: Any, names: list[str]) -> None:
        raise ConnectionError(f"Couldn't reach {names[0]} on the Hub")

    monkeypatch.setattr(TaskManager, "load", unreachable)
    with pytest.raises(InputError, match="lambada_openai needs the network .* use simba_lab_lambada_openai, the same"):
        load_tasks(["lambada_openai"], tasks)
    with pytest.raises(InputError, match="quiz needs the network for its documents; none of the offline tasks"):
        load_tasks(["quiz"], tasks)


def scores(name: str, **metrics: Metric) -> TaskScores:
    count = len(next(iter(metrics.values())).values)
    cost = Cost(10, count, count, [1.0])
    hashes = [str(number) for number in range(count)]
    return TaskScores(name, "1", count, list(range(count)), hashes, next(iter(metrics)), dict(metrics), cost, 0.1)


def share(right: int, of: int) -> Metric:
    return Metric(SHARE, True, np.repeat([1.0, 0.0], [right, of - right]), np.ones(of))


def test_an_average_counts_each_task_the_same_and_resamples_within_it() -> None:
    large, small = scores("large", acc=share(800, 1000)), scores("small", acc=share(0, 4))
    found = average_cell({"large": large, "small": small})
    assert found["value"] == pytest.approx(0.4)
    # The small task never varies, so the interval is half that of the large one: 1.96 sqrt(0.8 x 0.2 / 1000) / 2.
    assert found["interval"] == pytest.approx([0.4 - 0.0124, 0.4 + 0.0124], abs=0.0015)


def test_shares_have_wilsons_interval_and_perplexities_their_exponential() -> None:
    none = cell(share(0, 50))
    assert none["interval"] == pytest.approx([0.0, 0.0713], abs=1e-3)
    values = np.log(np.full(30, 8.0))
    found = cell(Metric(NATS, False, values, np.ones(30)))
    assert found["value"] == pytest.approx(8.0) and found["interval"] == pytest.approx([8.0, 8.0])


def test_differences_are_corrected_over_arms_and_columns() -> None:
    """With m comparisons the smallest p-value is multiplied by m; averages are a family of their own."""
    rows = {"worse": 40, "same": 60}
    arms = {
        name: ArmScores(name, {}, {t: scores(t, acc=share(right, 100)) for t in "ab"}) for name, right in rows.items()
    }
    reference = ArmScores("dense", {}, {task: scores(task, acc=share(60, 100)) for task in "ab"})
    alone = compare([(arms["worse"], reference)], 2000)
    both = compare([(arms["worse"], reference), (arms["same"], reference)], 2000)
    p_alone, p_both = (min(d.comparison.p_value for d in found if d.task == "a") for found in (alone, both))
    assert p_both == pytest.approx(2 * p_alone)
    assert {(d.arm, d.task, d.verdict) for d in both} == {
        *(("worse", task, "worse") for task in ("a", "b", "average")),
        *(("same", task, "not separable") for task in ("a", "b", "average")),
    }
    (average,) = [d for d in alone if d.task == "average"]
    assert average.comparison.difference == pytest.approx(-0.2)


def test_a_higher_perplexity_is_worse_whatever_the_sign_of_better() -> None:
    def arm(name: str, nats: float) -> ArmScores:
        values = nats + np.linspace(0, 1, 40)
        return ArmScores(name, {}, {"lm": scores("lm", perplexity=Metric(NATS, True, values, np.ones(40)))})

    (found,) = compare([(arm("pruned", 1.5), arm("dense", 1.0))], 1000)
    assert found.verdict == "worse" and found.comparison.difference == pytest.approx(0.5)


def test_metrics_of_the_harness_become_sums_over_documents() -> None:
    read = read_metric("bits_per_byte", "bits_per_byte", False, [(-math.log(2) * 6, 3), (-math.log(2) * 2, 1)])
    assert (read.kind, read.mean) == (NUMBER, pytest.approx(2.0))
    words = read_metric("word_perplexity", "weighted_perplexity", False, [(-4.0, 2), (-2.0, 1)])
    assert words.shown(words.mean) == pytest.approx(math.exp(2.0))
    assert read_metric("acc", "mean", True, [True, False]).kind == SHARE
    assert read_metric("f1", "f1_score", True, [(1, 1)]) is None
    assert read_metric("acc", "mean", True, [("a", "b")]) is None
    names = ["acc", "acc_norm"]
    assert [main_metric(task, names) for task in ("simba_lab_hellaswag", "hellaswag", "piqa")] == [
        "acc_norm", "acc_norm", "acc",
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "first_column"), [(60, "quiz acc"), (180, "dense")])
def test_arms_become_columns_on_a_narrow_terminal(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    width: int, first_column: str,
) -> None:  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(result))
    monkeypatch.setattr(eval_views, "WIDE", width)
    arms = list(read_results(tmp_path / "r.json").values())
    eval_views.print_comparison(arms, [])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"│ {first_column} ") for line in lines)
    assert max(map(len, lines)) <= width


def test_progress_bars_are_left_out_of_a_log_and_warnings_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    with without_bars():
        print("\r 10%|#", file=sys.stderr, end="")
        print("\r100%|##########", file=sys.stderr)
        print("1 of 2 contexts lost their oldest tokens", file=sys.stderr)
    assert capsys.readouterr().err == "1 of 2 contexts lost their oldest tokens\n"


def test_limits_and_names_of_checkpoints(tmp_path: Path) -> None:
    assert [read_limit(text) for text in ("0", "all", "12")] == [None, None, 12]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    named = [checkpoint_name(str(tmp_path / "run" / name)) for name in ("", "last.ckpt")]
    assert [*named, checkpoint_name("state-spaces/mamba-130m")] == ["run", "run-last", "state-spaces-mamba-130m"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_a_device_asked_for_by_name_must_be_there() -> None:
    assert {read_device(name, unasked="cuda:0").type for name in (None, "auto", "cpu", "cuda:0")} == {"cpu"}
    with pytest.raises(InputError, match="sees no CUDA device here; use cpu or auto, not cuda:0"):
        read_device("cuda:0")


def test_the_six_benchmarks_in_the_usual_columns(lab: tiny.Lab, tmp_path: Path) -> None:
    found = evaluation(lab.run, "paper6", "dense", tmp_path / "o", "--limit", "2")
    columns = list(found["comparison"]["values"][0]["cells"])
    assert [column.removeprefix("simba_lab_") for column in columns] == [
        "lambada_openai perplexity", "lambada_openai acc", "hellaswag acc_norm", "piqa acc", "arc_easy acc",
        "arc_challenge acc_norm", "winogrande acc", "average",
    ]  # fmt: skip
    assert set(found["comparison"]["documents"].values()) == {2}
