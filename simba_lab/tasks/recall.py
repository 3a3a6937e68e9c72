"""Needle and multi-query recall in words: facts in held-out text, asked for a chosen number of tokens later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simba_lab.data import TextData, Tokenizer, cut_eval_windows
from simba_lab.data.recall_text import ANSWERS, Fact, draw_facts
from simba_lab.errors import InputError
from simba_lab.tasks.task_files import Function, mean_metric, remove_tasks, write_documents, write_group, write_task
from simba_lab.tasks.word_starts import last_word_start, next_word_start

NEEDLE, MQAR = "simba_lab_needle", "simba_lab_mqar"
N_CHOICES = 8
GAP = "\n\n"


@dataclass(frozen=True)
class Kind:
    """A task family: how many facts are planted together, in which form, and how many of them are asked for."""

    name: str
    facts: int
    form: str
    questions: int


KINDS = (Kind(NEEDLE, 1, "sentence", 1), Kind(MQAR, 8, "pair", 4))


def build_recall(
    folder: Path,
    data: TextData,
    split: str = "test",
    n_context: int = 960,
    distances: Sequence[int] = (96, 288, 480, 672, 864),
    count: int = 100,
    reach: int | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Write both families, one task for each distance, into ``folder``; returns their names and numbers of items.

    A context is ``n_context`` tokens of one held-out document with the facts as a paragraph of their own, ``distance``
    tokens of the document before the question, which ends the context. The same texts, facts and questions serve every
    distance, so that differences between distances are paired. Eight answers are offered: in MQAR those of the other
    facts, so that it takes the key to tell them apart.

    Args:
        folder: where to write.
        data: the text; its tokenizer only measures lengths, so any model can take the tasks.
        split: split of the data.
        n_context: tokens of the context, facts and question included; up to 32 fewer, to be cut at words.
        distances: tokens between the facts and the question; up to 32 fewer.
        count: contexts wanted; of fewer possible ones, all. Each has one question in needle, four in MQAR.
        reach: the newest tokens that the model compared with can see. If given, there are groups of the distances
            within it and of those beyond.
        seed: decides texts, facts, questions and answers offered.

    Raises InputError if a distance leaves no room in ``n_context``, or no document is long enough.
    """
    distances = sorted(set(distances))
    texts = _fillers(data, split, n_context, count, seed)
    sizes: dict[str, int] = {}
    note = {"source": data.settings.source, "split": split, "n_context": n_context, "reach": reach, "seed": seed}
    # Everything is made before anything is written: a distance that does not fit leaves no half of the tasks behind.
    built = {
        (kind, distance): _items(kind, texts, data.tokenizer, n_context, distance, seed)
        for kind in KINDS
        for distance in distances
    }
    for kind in KINDS:
        remove_tasks(folder, kind.name)
    for (kind, distance), items in built.items():
        name = f"{kind.name}_{distance}"
        file = folder / f"{name}.jsonl"
        write_documents(file, items)
        write_task(folder, name, _settings(), note | {"distance": distance, "documents": len(items)}, file)
        sizes[name] = len(items)
    for kind in KINDS:
        _write_groups(folder, kind.name, distances, reach, note)
    return sizes


def _write_groups(folder: Path, name: str, distances: Sequence[int], reach: int | None, note: dict[str, Any]) -> None:
    groups = {name: list(distances)}
    if reach is not None:
        groups[f"{name}_within_reach"] = [distance for distance in distances if distance <= reach]
        groups[f"{name}_beyond_reach"] = [distance for distance in distances if distance > reach]
    for group, members in groups.items():
        if members:
            tasks = [f"{name}_{distance}" for distance in members]
            write_group(folder, group, tasks, ["acc", "exact_match"], note | {"distances": members})


def _fillers(data: TextData, split: str, n_context: int, count: int, seed: int) -> list[list[int]]:
    """Up to ``count`` runs of ``n_context`` + 1 tokens, each of one document, evenly spread over the split.

    The last token is not used; it says whether a word ends before it.
    """
    shard = data.shard(split)
    if not (shard.lengths > n_context).any():
        best = int(shard.lengths.max(initial=0))
        raise InputError(
            f"n_context: no document of the {split} split has more than {n_context} tokens, the longest has {best}; "
            "lower it or give longer text"
        )
    windows = cut_eval_windows(shard, n_context, 1, count, stride=n_context, seed=seed)
    return windows.tokens.tolist()


def _items(
    kind: Kind, texts: Sequence[list[int]], tokenizer: Tokenizer, n_context: int, distance: int, seed: int
) -> list[dict[str, Any]]:
    items = []
    for number, filler in enumerate(texts):
        # Not keyed by the distance: every distance asks the same.
        generator = np.random.default_rng([seed, kind.facts, number])
        facts = draw_facts(generator, kind.facts, kind.form)
        for index in generator.permutation(kind.facts)[: kind.questions]:
            asked = facts[index]
            context = _context(filler, facts, asked, tokenizer, n_context, distance)
            choices, answer = _choices(asked, facts, generator)
            items.append({"context": context, "choices": choices, "answer": answer, "distance": distance})
    return items


def _context(
    filler: list[int], facts: Sequence[Fact], asked: Fact, tokenizer: Tokenizer, n_context: int, distance: int
) -> str:
    """Older text, the facts, ``distance`` tokens of the text's newest part, the question."""
    planted = GAP + " ".join(fact.statement for fact in facts) + GAP
    question = GAP + asked.question
    room = n_context - distance - len(tokenizer.encode(planted)) - len(tokenizer.encode(question))
    if distance < 1 or room < 0:
        most = distance + room
        raise InputError(f"distances: {distance} must lie in 1..{most}, n_context {n_context} less facts and question")
    end = last_word_start(filler, n_context, tokenizer) or n_context
    first, middle = (_word_start(filler, max(0, end - back), tokenizer) for back in (distance + room, distance))
    old, new = tokenizer.decode(filler[first:middle]), tokenizer.decode(filler[middle:end])
    return (old.strip() + planted + new.strip() + question).lstrip()


def _word_start(tokens: list[int], position: int, tokenizer: Tokenizer) -> int:
    """Where to cut: at a word; in text without words right at ``position``."""
    found = next_word_start(tokens, position, tokenizer)
    return position if found is None else found


def _choices(asked: Fact, facts: Sequence[Fact], generator: np.random.Generator) -> tuple[list[str], int]:
    """Eight different answers, those of the other facts first, in random order; and the place of the right one."""
    others = [
        *(fact.answer for fact in facts),
        *(f" {ANSWERS[index]}" for index in generator.permutation(len(ANSWERS))),
    ]
    wrong = [answer for answer in dict.fromkeys(others) if answer != asked.answer][: N_CHOICES - 1]
    place = int(generator.integers(N_CHOICES))
    return [*wrong[:place], asked.answer, *wrong[place:]], place


def _settings() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "process_results": Function("simba_lab.tasks.results.recall"),
        "metric_list": [
            mean_metric("acc"),
            mean_metric("exact_match"),
            mean_metric("answer_nats", higher_is_better=False),
        ],
    }
