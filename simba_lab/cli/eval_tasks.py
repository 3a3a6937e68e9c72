"""``simba-lab eval --tasks`` and ``--compare``: arms on tasks of the evaluation harness, paired by document."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simba_lab.cli.eval_views import print_comparison, print_differences
from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.compare import compare, file_pairs
from simba_lab.evaluate.benchmarks.store import RESULTS, ArmScores, ScoreStore, as_results, read_results
from simba_lab.files import finite, write_json

HOME = Path("runs/eval")
ALL = ("0", "all")


def run_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate every arm on every task, keep the results on disk, print them side by side."""
    from simba_lab.evaluate.benchmarks.tasks import load_tasks

    limit, line_width = read_limit(args.limit), args.line_width or None
    folder = results_folder(args.out or HOME / checkpoint_name(args.checkpoint), line_width)
    arms = _arms(args, folder)
    tasks = load_tasks([name for name in args.tasks.split(",") if name], line_width=line_width)
    from simba_lab.evaluate.benchmarks.arms import evaluate_tasks

    found = evaluate_tasks(arms, tasks, limit, ScoreStore(folder), lambda line: print(line, flush=True))
    results = as_results(found, _about(args, arms[0].lm.model.config, str(arms[0].lm.model.device)))
    reference, *others = found.values()
    differences = compare([(arm, reference) for arm in others])
    results["comparison"] = print_comparison(list(found.values()), differences)
    write_json(folder / RESULTS, finite(results))
    print(f"{folder / RESULTS}: every document's scores; for `simba-lab eval --compare`")
    return results


def _arms(args: argparse.Namespace, folder: Path) -> Sequence[Any]:
    """Bad arms are refused before tasks are built, which takes longer."""
    from simba_lab.checkpoint import load, tokenizer_path
    from simba_lab.data import Tokenizer
    from simba_lab.evaluate.arguments import read_device
    from simba_lab.evaluate.benchmarks.arms import read_arms

    device = read_device(args.device)
    model = load(args.checkpoint, dtype=args.dtype).to(device)
    tokenizer = Tokenizer.load(tokenizer_path(args.checkpoint))
    return read_arms(args.arms, model, tokenizer, args.batch_size, str(folder / "answers"))


def _about(args: argparse.Namespace, config: Any, device: str) -> dict[str, Any]:
    from dataclasses import asdict

    from simba_lab import environment
    from simba_lab.kernels.cost import CONVENTION

    return {
        "checkpoint": args.checkpoint, "limit": args.limit, "line_width": args.line_width or None,
        "shape": asdict(config), "device": device, "convention": CONVENTION,
        "command": environment.command_line(), "environment": environment.describe(),
    }  # fmt: skip


def read_limit(text: str) -> int | None:
    """Documents per task; None for all. Raises InputError for what is no number."""
    if text in ALL:
        return None
    if not text.isdecimal():
        raise InputError(f"--limit must be a number of documents, or 0 or all for every one, got {text!r}")
    return int(text)


def results_folder(folder: Path, line_width: int | None) -> Path:
    """Results of another line width lie in a folder of their own below ``folder``, whoever named it."""
    return folder if line_width is None else folder / f"width{line_width}"


def checkpoint_name(checkpoint: str) -> str:
    """Of a run folder its name, of a file in one both names, of a name on the hub all of it."""
    path = Path(checkpoint)
    parts = [path.resolve().parent.name, path.stem] if path.is_file() else [path.resolve().name]
    return "-".join(parts) if path.exists() else re.sub(r"[^A-Za-z0-9_.=-]+", "-", checkpoint)


def compare_files(first: Path, second: Path) -> dict[str, Any]:
    """Print the paired differences of two result files; nothing is evaluated."""
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    before, after = read_results(first), read_results(second)
    pairs = file_pairs(before, after, names)
    differences = compare(pairs)
    shown: dict[str, ArmScores] = {arm.name: arm for pair in pairs for arm in reversed(pair)}
    return {"files": [str(first), str(second)]} | print_differences(list(shown.values()), differences)
