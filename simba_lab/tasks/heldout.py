"""Tasks of the harness from held-out text: which of four continuations is the true one, and whole texts' likelihood."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simba_lab.data import EvalWindows, Shard, TextData, Tokenizer, cut_eval_windows
from simba_lab.errors import InputError
from simba_lab.tasks.task_files import mean_metric, write_documents, write_task

CONTINUATION, PERPLEXITY = "simba_lab_continuation", "simba_lab_perplexity"
N_CHOICES = 4
_CUT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Passage:
    """A piece of held-out text and what follows it, of document number ``document``."""

    document: int
    context: str
    continuation: str


def build_heldout(
    folder: Path,
    data: TextData,
    split: str = "test",
    count: int = 200,
    n_context: int = 512,
    n_choice: int = 16,
    documents: int = 16,
    document_tokens: int = 1024,
    seed: int = 0,
) -> dict[str, int]:
    """Write both tasks below into ``folder``; returns their names and numbers of items.

    Args:
        folder: where to write; the YAML files name their data by absolute path.
        data: the text; its tokenizer only measures lengths, so any model can take the tasks.
        split: split of the data.
        count: multiple-choice items wanted; of fewer possible ones, all.
        n_context: tokens of context.
        n_choice: tokens of each choice.
        documents: texts of the perplexity task.
        document_tokens: tokens of each, from its beginning.
        seed: decides which passages, which distractors, and their order.

    Raises InputError if the split is too small.
    """
    shard = data.shard(split)
    passages = continuation_passages(shard, data.tokenizer, count, n_context, n_choice, seed)
    texts = opening_texts(shard, data.tokenizer, documents, document_tokens)
    built = {CONTINUATION: continuation_items(passages, seed), PERPLEXITY: [{"text": text} for text in texts]}
    note = {"split": split, "n_context": n_context, "n_choice": n_choice, "seed": seed}
    for name, settings in ((CONTINUATION, _continuation_settings()), (PERPLEXITY, _perplexity_settings())):
        data_file = folder / f"{name}.jsonl"
        write_documents(data_file, built[name])
        write_task(folder, name, settings, note, data_file)
    return {name: len(items) for name, items in built.items()}


def continuation_passages(
    shard: Shard, tokenizer: Tokenizer, count: int, n_context: int, n_choice: int, seed: int
) -> list[Passage]:
    """Up to ``count`` passages in a random order, from all over the split, whose continuation starts at a word.

    That is: with white space, so that context and continuation tokenise together as they do apart.
    """
    # Four candidates for each passage wanted are enough to find those that start at a word.
    windows = cut_eval_windows(shard, n_context, n_choice, 4 * count, seed=seed)
    order = np.random.default_rng([seed, 0]).permutation(len(windows))
    usable = (passage for index in order if (passage := _passage(windows, index, tokenizer)))
    return list(itertools.islice(usable, count))


def _passage(windows: EvalWindows, index: int, tokenizer: Tokenizer) -> Passage | None:
    tokens = windows.tokens[index].tolist()
    context, continuation = tokenizer.decode(tokens[: windows.n_context]), tokenizer.decode(tokens[windows.n_context :])
    starts_at_word = continuation[:1].isspace() and not context[-1:].isspace() and continuation.strip()
    if not starts_at_word or _CUT in context + continuation:
        return None
    return Passage(int(windows.document[index]), context, continuation)


def continuation_items(passages: Sequence[Passage], seed: int) -> list[dict[str, Any]]:
    """Items {context, choices, answer}: the true continuation among those of passages from other documents.

    Raises InputError if fewer than four documents contribute, for then there are no distractors.
    """
    generator = np.random.default_rng([seed, 1])
    if len({passage.document for passage in passages}) < N_CHOICES:
        raise InputError(f"tasks: {N_CHOICES} choices need passages of as many documents; give more text")
    items = []
    for passage in passages:
        wrong: list[str] = []
        for index in generator.permutation(len(passages)):
            other = passages[index]
            if other.document != passage.document and other.continuation not in (*wrong, passage.continuation):
                wrong.append(other.continuation)
            if len(wrong) == N_CHOICES - 1:
                break
        answer = int(generator.integers(N_CHOICES))
        choices = [*wrong[:answer], passage.continuation, *wrong[answer:]]
        items.append({"context": passage.context, "choices": choices, "answer": answer})
    return items


def opening_texts(shard: Shard, tokenizer: Tokenizer, count: int, n_tokens: int) -> list[str]:
    """Beginnings of up to ``count`` documents of ``n_tokens`` tokens or more, evenly spread over the split."""
    long_enough = np.flatnonzero(shard.lengths >= n_tokens)
    if not len(long_enough):
        raise InputError(f"tasks: no document of the {shard.split} split has {n_tokens} tokens; lower document_tokens")
    chosen = long_enough[np.unique(np.linspace(0, len(long_enough) - 1, min(count, len(long_enough))).astype(int))]
    return [tokenizer.decode(shard.document(index)[:n_tokens].tolist()).rstrip(_CUT) for index in chosen]


def _continuation_settings() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [mean_metric("acc"), mean_metric("acc_norm")],
    }


def _perplexity_settings() -> dict[str, Any]:
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in names],
    }
