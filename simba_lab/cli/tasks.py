"""``simba-lab tasks build``: tasks of the evaluation harness from the held-out text of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from simba_lab.errors import InputError

EXAMPLES = """examples:
  simba-lab tasks build --checkpoint runs/base --out runs/tasks
  simba-lab tasks build --config experiments/base.yaml --out runs/tasks --n-context 960
  simba-lab lm-eval run --model simba_lab --tasks runs/tasks/simba_lab_continuation.yaml \\
      --model_args checkpoint=runs/base,criterion=global_impact,schedule=linear,mean_keep=0.55
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tasks``."""
    parser.description = (
        "Writes two tasks of the evaluation harness, each a YAML file and its data: simba_lab_continuation (which of "
        "four continuations follows a passage) and simba_lab_perplexity (rolling likelihood of whole texts)."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("action", choices=["build"], help="what to do")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--checkpoint", type=Path, metavar="RUN", help="run folder whose data to take")
    text.add_argument("--config", type=Path, metavar="FILE", help="experiment file whose data to take")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument("--split", default="test", choices=["validation", "test"], help="text to use (%(default)s)")
    for option, value, meaning in (
        ("--count", 200, "multiple-choice items, at most"),
        ("--n-context", 512, "tokens of context of each"),
        ("--n-choice", 16, "tokens of each choice"),
        ("--documents", 16, "texts of the perplexity task, at most"),
        ("--document-tokens", 1024, "tokens of each text"),
        ("--seed", 0, "decides passages, distractors and their order"),
    ):
        parser.add_argument(option, type=int, default=value, metavar="N", help=f"{meaning} (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build and print what was written."""
    from simba_lab.evaluate.tasks import build_tasks

    for name in ("count", "n_context", "n_choice", "documents", "document_tokens"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    sizes = build_tasks(
        args.out, _data(args), args.split, args.count, args.n_context, args.n_choice, args.documents,
        args.document_tokens, args.seed,
    )  # fmt: skip
    files = {name: str(args.out / f"{name}.yaml") for name in sizes}
    for name, size in sizes.items():
        print(f"{files[name]}: {size} items")
    return {"items": sizes, "files": files}


def _data(args: argparse.Namespace) -> Any:
    """The text data module that a run or an experiment file describes."""
    from simba_lab.data import TextData
    from simba_lab.training.lightning_cli import CONFIG_FILE, read_experiment

    path = args.config if args.config is not None else args.checkpoint / CONFIG_FILE
    data = read_experiment(path).data
    if not isinstance(data, TextData):
        raise InputError(f"{path}: tasks are built from text, not from {type(data).__name__}; data must be TextData")
    return data
