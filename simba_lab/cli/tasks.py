"""``simba-lab tasks``: tasks of the evaluation harness that need no network, built and listed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError

if TYPE_CHECKING:
    from simba_lab.data import TextData

EXAMPLES = """examples:
  simba-lab tasks build                                  (the paper's six benchmarks, in runs/tasks)
  simba-lab tasks build --line-width 70                  (in lines of 70 characters, in runs/tasks/paper6_width70)
  simba-lab tasks build heldout --checkpoint runs/base
  simba-lab tasks build long-context --checkpoint runs/base --source 'books/*.jsonl.bz2' --lengths 512 2048 8192
  simba-lab tasks build recall --checkpoint runs/base --n-context 960 --reach 480
  simba-lab tasks list
  simba-lab tasks samples --limit 200 > samples.json     (evenly spread; the harness's --limit takes the first ones)
  simba-lab lm-eval run --model simba_lab --include_path runs/tasks --tasks paper6 --samples samples.json \\
      --model_args checkpoint=runs/base,criterion=global_impact,schedule=linear,mean_keep=0.55
"""
PAPER6 = "paper6"
WHAT = {
    PAPER6: "lambada_openai, hellaswag, piqa, arc_easy, arc_challenge and winogrande, with the harness's own prompts",
    "heldout": "which of four continuations follows a passage, and the rolling likelihood of whole texts",
    "long-context": "the same suffixes after contexts of growing length",
    "recall": "needle and multi-query recall in words, at chosen distances",
}
# Option -> default and meaning, of what takes text; named like the arguments of the functions that build.
NUMBERS = {
    "heldout": {
        "count": (200, "multiple-choice items, at most"),
        "n_context": (512, "tokens of context of each"),
        "n_choice": (16, "tokens of each choice"),
        "documents": (16, "texts of the perplexity task, at most"),
        "document_tokens": (1024, "tokens of each text"),
    },
    "long-context": {
        "count": (64, "texts, at most"),
        "n_scored": (64, "tokens at the end of each that are scored"),
    },
    "recall": {
        "count": (100, "contexts, at most"),
        "n_context": (960, "tokens of each"),
    },
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions of ``tasks`` and their arguments."""
    parser.description = "Tasks of the evaluation harness that need no network: YAML files and their documents."
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    _configure_build(actions.add_parser("build", help="write tasks", description="Writes tasks."))
    for name, summary in (
        ("list", "what has been built, and what can be"),
        ("samples", "evenly spread documents of the six benchmarks, as the harness's --samples takes them"),
    ):
        _add_ends(actions.add_parser(name, help=summary, description=summary))
    samples = actions.choices["samples"]
    _add_line_width(samples, 0)
    samples.add_argument("--limit", type=int, required=True, metavar="N", help="documents of each task, at most")


def _configure_build(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", metavar="WHAT", title="what to build (paper6)")
    _add_ends(parser)
    _add_line_width(parser, 0)
    for name, summary in WHAT.items():
        sub = kinds.add_parser(name, help=summary, description=f"Writes {summary}.")
        _add_ends(sub, inherited=True)
        if name in NUMBERS:
            _add_text(sub)
            for option, (value, meaning) in NUMBERS[name].items():
                _add_number(sub, option, value, meaning)
            _add_number(sub, "seed", 0, "decides what is chosen")
    _add_line_width(kinds.choices[PAPER6], argparse.SUPPRESS)
    lengths = "tokens of context and suffix together (512 to 16384, doubling)"
    _add_list(kinds.choices["long-context"], "--lengths", lengths)
    recall = kinds.choices["recall"]
    _add_list(recall, "--distances", "tokens from facts to question (a tenth to nine tenths of --n-context)")
    recall.add_argument("--reach", type=int, metavar="N", help="group the distances within N tokens, and those beyond")


def _add_ends(parser: argparse.ArgumentParser, inherited: bool = False) -> None:
    """Where to write; without a value of their own, subcommands keep what was given before them."""
    folder = argparse.SUPPRESS if inherited else Path("runs/tasks")
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help="folder of the tasks (runs/tasks)")
    parser.add_argument(
        "--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write the result to FILE as JSON"
    )


def _add_line_width(parser: argparse.ArgumentParser, default: Any) -> None:
    """For the six alone: other tasks are made of a model's own text, whose lines are as it knows them."""
    text = "paper6 in lines of at most N characters, tasks named _widthN (0, the default: as published)"
    parser.add_argument("--line-width", type=int, default=default, metavar="N", help=text)


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="RUN", help="run folder whose data to take")
    parser.add_argument("--config", type=Path, metavar="FILE", help="experiment file whose data to take")
    text = "file, folder or glob instead, as data.source of an experiment; with --checkpoint its tokenizer is used"
    parser.add_argument("--source", metavar="TEXT", help=text)
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="text to use (%(default)s)")


def _add_number(parser: argparse.ArgumentParser, name: str, value: int, meaning: str) -> None:
    option = f"--{name.replace('_', '-')}"
    parser.add_argument(option, type=int, default=value, metavar="N", help=f"{meaning} (%(default)s)")


def _add_list(parser: argparse.ArgumentParser, option: str, meaning: str) -> None:
    parser.add_argument(option, type=int, nargs="+", metavar="N", help=meaning)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do it and print what there is."""
    return {"build": _build, "list": _list, "samples": _samples}[args.action](args)


def _build(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.tasks import documents_of, ensure_paper6

    if args.what in (None, PAPER6):
        folder = ensure_paper6(args.out, args.line_width or None)
        sizes = documents_of(folder)
    elif args.line_width:
        raise InputError(f"--line-width is for {PAPER6}; {args.what} is made of a text, whose lines stay as they are")
    else:
        folder = args.out / args.what
        sizes = _build_from_text(folder, args)
    for name, size in sizes.items():
        print(f"{folder / name}.yaml: {size:,} items")
    return {"items": sizes, "files": {name: str(folder / f"{name}.yaml") for name in sizes}}


def _build_from_text(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    from simba_lab.tasks import build_heldout, build_long_context, build_recall

    numbers = {name: getattr(args, name) for name in NUMBERS[args.what]}
    _require_positive(numbers)
    options: dict[str, Any] = {"data": _data(args), "split": args.split, "seed": args.seed, **numbers}
    if args.what == "heldout":
        return build_heldout(folder, **options)
    if args.what == "long-context":
        _require_positive({"lengths": min(args.lengths or [1])})
        return build_long_context(folder, **options | ({"lengths": args.lengths} if args.lengths else {}))
    distances = args.distances or [args.n_context * tenths // 10 for tenths in (1, 3, 5, 7, 9)]
    return build_recall(folder, distances=distances, reach=args.reach, **options)


def _require_positive(numbers: dict[str, int]) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.tasks import PAPER6 as BENCHMARKS
    from simba_lab.tasks import built_tasks

    built = built_tasks(args.out)
    for file in built.values():
        print(file)
    if not built:
        print(f"nothing in {args.out} yet; `simba-lab tasks build` writes:")
        for benchmark in BENCHMARKS:
            print(f"  {benchmark.task}: {benchmark.size:,} items, {benchmark.source}")
    return {"files": {name: str(file) for name, file in built.items()}}


def _samples(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.tasks import documents_of, ensure_paper6, even_samples

    samples = even_samples(documents_of(ensure_paper6(args.out, args.line_width or None)), args.limit)
    print(json.dumps(samples))
    return {"samples": samples}


def _data(args: argparse.Namespace) -> TextData:
    """The text data module that a run or an experiment file describes, or a source of its own."""
    from simba_lab.checkpoint import tokenizer_path
    from simba_lab.data import TextData
    from simba_lab.training import CONFIG_FILE, read_experiment

    given = [name for name in ("checkpoint", "config", "source") if getattr(args, name) is not None]
    if given not in (["checkpoint"], ["config"], ["source"], ["checkpoint", "source"]):
        raise InputError("say which text: --checkpoint, --config or --source (which --checkpoint may go with)")
    if args.source is not None:
        return TextData(args.source, tokenizer=str(tokenizer_path(args.checkpoint)) if args.checkpoint else "bpe")
    path = args.config or Path(args.checkpoint) / CONFIG_FILE
    data = read_experiment(path).data
    if not isinstance(data, TextData):
        raise InputError(f"{path}: tasks are built from text, not from {type(data).__name__}; data must be TextData")
    return data
