"""Quality against context length: the same held-out suffixes after ever longer contexts, one task for each length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simba_lab.data import EvalWindows, Shard, TextData, Tokenizer, cut_eval_windows
from simba_lab.errors import InputError
from simba_lab.tasks.task_files import Function, mean_metric, remove_tasks, write_documents, write_group, write_task
from simba_lab.tasks.word_starts import next_word_start, survives

LONG_CONTEXT = "simba_lab_long_context"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
N_SCORED = 64
# So many candidates for each text wanted leave enough whose suffix starts at a word.
_CANDIDATES = 8


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
    windows = cut_eval_windows(shard, longest - n_scored, n_scored, _CANDIDATES * count, seed=seed)
    order = np.random.default_rng([seed, 0]).permutation(len(windows))
    usable = ((int(row), starts) for row in order if (starts := _starts(windows, row, lengths, tokenizer)))
    chosen = sorted(itertools.islice(usable, count), key=lambda pair: pair[0])
    if not chosen:
        raise InputError(f"lengths: no window of {longest} tokens can be cut at words; give text in words")
    return [_document(windows, shard.names, row, starts, tokenizer) for row, starts in chosen]


def _starts(windows: EvalWindows, row: int, lengths: Sequence[int], tokenizer: Tokenizer) -> dict[int, int] | None:
    """Token at which the context of each length begins; None unless every one tokenises as it was cut."""
    tokens = windows.tokens[row].tolist()
    suffix = tokenizer.decode(tokens[windows.n_context :])
    if not suffix[:1].isspace() or not suffix.strip():
        return None
    starts = {}
    for length in lengths:
        start = next_word_start(tokens, len(tokens) - length, tokenizer)
        if start is None or not survives(tokenizer.decode(tokens[start:]), tokens[start:], tokenizer):
            return None
        starts[length] = start
    return starts if _ends_in_a_word(tokens[: windows.n_context], tokenizer) else None


def _ends_in_a_word(context: Sequence[int], tokenizer: Tokenizer) -> bool:
    """The harness moves white space at the end of a context into the continuation."""
    return not tokenizer.decode(context[-1:])[-1:].isspace()


def _document(
    windows: EvalWindows, names: Sequence[str], row: int, starts: dict[int, int], tokenizer: Tokenizer
) -> dict[str, Any]:
    tokens = windows.tokens[row].tolist()
    continuation = tokenizer.decode(tokens[windows.n_context :])
    return {
        "document": names[windows.document[row]],
        "context": tokenizer.decode(tokens[: windows.n_context]),
        "starts": {str(length): len(tokenizer.decode(tokens[:start])) for length, start in starts.items()},
        "continuation": continuation,
        "n_tokens": windows.n_suffix,
        "n_bytes": len(continuation.encode()),
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
