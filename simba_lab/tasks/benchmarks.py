"""The six benchmarks of the Simba paper (and of Mamba's): where their documents are, and which task of the harness."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from simba_lab.data.package import read_documents, read_table
from simba_lab.errors import InputError

PREFIX = "simba_lab_"
Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as the evaluation harness defines it, over documents of the data package.

    Attributes:
        name: the harness's name of its own, online task; ours is ``task``.
        stock: the harness's YAML file, below its folder of tasks.
        split: the split that the harness evaluates.
        size: its number of documents.
        read: the documents, with the fields that the harness's prompts use.
        source: the dataset, and how its documents here differ from the hub's, if they do.
        licence: as the dataset's card or authors say.
    """

    name: str
    stock: str
    split: str
    size: int
    read: Callable[[], Documents]
    source: str
    licence: str

    @property
    def task(self) -> str:
        """Name of the offline task."""
        return PREFIX + self.name

    def documents(self) -> Documents:
        """All documents of the split. Raises InputError if there are more or fewer than the official number."""
        found = self.read()
        if len(found) != self.size:
            raise InputError(f"{self.name}: the data package holds {len(found)} documents, the benchmark {self.size}")
        return found


def in_width(name: str, line_width: int | None) -> str:
    """Name of a task or group of ours in lines of ``line_width`` characters; None leaves it as published."""
    return name if line_width is None else f"{name}_width{line_width}"


def stock_name(task: str) -> str:
    """The harness's name of the task of which ``task`` may be our twin, in whatever line width."""
    return re.sub(r"_width\d+$", "", task.removeprefix(PREFIX)) if task.startswith(PREFIX) else task


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of the harness's or of our name. Raises InputError, which lists the names, for any other."""
    for benchmark in PAPER6:
        if name in (benchmark.name, benchmark.task):
            return benchmark
    names = [benchmark.name for benchmark in PAPER6]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no benchmark '{name}'; it is one of {', '.join(names)}{hint}")


def _lambada() -> Documents:
    """The harness splits the text at its last space into what it shows and what it asks for."""
    documents = read_documents("lambada/bpb_0shot")
    return [{"text": f"{document['query']} {document['answers_text'][0]}"} for document in documents]


def _hellaswag() -> Documents:
    return read_table("hellaswag/none/validation")


def _piqa() -> Documents:
    return read_table("piqa/plain_text/validation")


def _winogrande() -> Documents:
    return read_table("winogrande/winogrande_xl/validation")


def _arc_easy() -> Documents:
    return [arc_row(document) for document in read_documents("arc_easy/test_rc_5shot")]


def _arc_challenge() -> Documents:
    return [arc_row(document) for document in read_documents("arc_challenge/test_rc_5shot")]


def arc_row(document: dict[str, Any]) -> dict[str, Any]:
    """A row of ARC from a document of the package, which has the question in the package's prompt."""
    labels = "ABCDE"[: len(document["choices"])]
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": list(labels)},
        "answerKey": labels[document["gold"]],
    }


_LAMBADA_TEXT = (
    "EleutherAI/lambada_openai (en), every run of white space one space: paragraph breaks are lost, so that numbers "
    "differ slightly from those over the original text"
)
_ARC_LABELS = "choices are labelled A to E throughout (a few questions of the original have 1 to 4)"

PAPER6 = (
    Benchmark("lambada_openai", "lambada/lambada_openai.yaml", "test", 5153, _lambada, _LAMBADA_TEXT, "MIT (hub card)"),
    Benchmark("hellaswag", "hellaswag/hellaswag.yaml", "validation", 10042, _hellaswag, "Rowan/hellaswag", "MIT"),
    Benchmark(
        "piqa", "piqa/piqa.yaml", "validation", 1838, _piqa, "piqa (plain_text)", "AFL-3.0 (authors' repository)"
    ),
    Benchmark(
        "arc_easy",
        "arc/arc_easy.yaml",
        "test",
        2376,
        _arc_easy,
        f"allenai/ai2_arc (ARC-Easy); {_ARC_LABELS}",
        "CC-BY-SA-4.0",
    ),
    Benchmark(
        "arc_challenge",
        "arc/arc_challenge.yaml",
        "test",
        1172,
        _arc_challenge,
        f"allenai/ai2_arc (ARC-Challenge); {_ARC_LABELS}",
        "CC-BY-SA-4.0",
    ),
    Benchmark(
        "winogrande",
        "winogrande/default.yaml",
        "validation",
        1267,
        _winogrande,
        "allenai/winogrande (winogrande_xl)",
        "CC-BY (authors' repository)",
    ),
)
