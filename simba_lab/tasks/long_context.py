"""Quality against context length: the same held-out suffixes after ever longer contexts, one task for each length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from simba_lab.data import Shard, TextData, Tokenizer
from simba_lab.errors import InputError
from simba_lab.tasks.task_files import Function, mean_metric, remove_tasks, write_documents, write_group, write_task
from simba_lab.tasks.word_starts import next_word_start, survives

LONG_CONTEXT = "simba_lab_long_context"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
N_SCORED = 64
# Places looked at for each text wanted; most suffixes begin or end inside a word.
_TRIES = 100


@dataclass(frozen=True)
class Window:
    """Context of the greatest length, scored suffix, and the character at which the context of each length begins."""

    document: str
    context: str
    suffix: str
    starts: dict[int, int]


def build_long_context(
    folder: Path,
    data: TextData,
    split: str = "test",
    lengths: Sequence[int] = LENGTHS,
    count: int = 64,
    n_scored: int = N_SCORED,
    seed: int = 0,
) -> dict[str, int]:
    """Write one task for each length T into ``folder``; returns their names and numbers of texts.

    Each text ends in ``n_scored`` tokens that are scored; before them stand T - n_scored tokens of context (up to 32
    fewer, to start at a word). All tasks share their texts and suffixes, so that differences between lengths are
    paired. Metrics: nats per token, bits per byte.

    Args:
        folder: where to write.
        data: the text; its tokenizer only measures lengths, so any model can take the tasks.
        split: split of the data.
        lengths: tokens of context and suffix together, each above ``n_scored``.
        count: texts wanted; of fewer possible ones, all.
        n_scored: tokens of the suffix.
        seed: decides which texts.

    Raises InputError if no document is as long as the greatest length.
    """
    lengths = sorted(set(lengths))
    if lengths[0] <= n_scored:
        raise InputError(f"lengths: {lengths[0]} tokens leave no context before the {n_scored} scored; ask for more")
    documents = _documents(data.shard(split), data.tokenizer, lengths, count, n_scored, seed)
    remove_tasks(folder, LONG_CONTEXT)
    file = folder / f"{LONG_CONTEXT}.jsonl"
    write_documents(file, documents)
    names = {length: f"{LONG_CONTEXT}_{length}" for length in lengths}
    note = {"source": data.settings.source, "split": split, "documents": len(documents), "n_scored": n_scored}
    for length, name in names.items():
        write_task(folder, name, _settings(length), note | {"n_tokens": length, "seed": seed}, file)
    write_group(folder, LONG_CONTEXT, list(names.values()), [], note | {"lengths": lengths})
    return dict.fromkeys(names.values(), len(documents))


def _documents(
    shard: Shard, tokenizer: Tokenizer, lengths: Sequence[int], count: int, n_scored: int, seed: int
) -> list[dict[str, Any]]:
    longest = max(lengths)
    if not (shard.lengths >= longest).any():
        best = int(shard.lengths.max(initial=0))
        raise InputError(
            f"lengths: no document of the {shard.split} split has {longest} tokens, the longest has {best}; "
            "leave out the greatest lengths or give longer text"
        )
    places = itertools.islice(_places(shard, longest, n_scored, seed), _TRIES * count)
    windows = (_window(shard, place, lengths, n_scored, tokenizer) for place in places)
    found = itertools.islice(filter(None, windows), count)
    chosen = list(track(found, "cutting texts", total=count, console=Console(stderr=True), transient=True))
    if not chosen:
        raise InputError(f"lengths: no window of {longest} tokens can be cut at words; give text in words")
    return [_document(window, n_scored) for window in chosen]


def _places(shard: Shard, length: int, stride: int, seed: int) -> Iterator[tuple[int, int]]:
    """(document, its first token to take) of windows whose last ``stride`` tokens never overlap, in random order."""
    per_document = np.where(shard.lengths >= length, (shard.lengths - length) // stride + 1, 0)
    ends = np.cumsum(per_document)
    for number in np.random.default_rng(seed).permutation(int(ends[-1])):
        document = int(np.searchsorted(ends, number, side="right"))
        yield document, int(number - ends[document] + per_document[document]) * stride


def _window(
    shard: Shard, place: tuple[int, int], lengths: Sequence[int], n_scored: int, tokenizer: Tokenizer
) -> Window | None:
    """None unless the suffix starts at a word and what is cut for each length tokenises as before."""
    document, first = place
    tokens = shard.document(document)[first : first + max(lengths)].tolist()
    context, suffix = tokenizer.decode(tokens[:-n_scored]), tokenizer.decode(tokens[-n_scored:])
    # The harness moves white space at the end of a context into the continuation.
    if not suffix[:1].isspace() or not suffix.strip() or context[-1:].isspace():
        return None
    starts = {}
    for length in lengths:
        start = next_word_start(tokens, len(tokens) - length, tokenizer)
        if start is None:
            return None
        text = tokenizer.decode(tokens[start:])
        if not survives(text, tokens[start:], tokenizer):
            return None
        starts[length] = len(context) + len(suffix) - len(text)
    return Window(shard.names[document], context, suffix, starts)


def _document(window: Window, n_scored: int) -> dict[str, Any]:
    return {
        "document": window.document,
        "context": window.context,
        "starts": {str(length): start for length, start in window.starts.items()},
        "continuation": window.suffix,
        "n_tokens": n_scored,
        "n_bytes": len(window.suffix.encode()),
    }


def _settings(length: int) -> dict[str, Any]:
    return {
        "output_type": "loglikelihood",
        "doc_to_text": f"{{{{context[starts['{length}']:]}}}}",
        "doc_to_target": "{{continuation}}",
        "target_delimiter": "",
        "process_results": Function("simba_lab.tasks.results.suffix_quality"),
        "metric_list": [
            mean_metric("nats_per_token", higher_is_better=False),
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    }
