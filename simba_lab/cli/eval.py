"""``simba-lab eval``: quality of a model, dense and pruned: on held-out windows, or on tasks of the harness."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError

if TYPE_CHECKING:
    from simba_lab.data import TextData

EXAMPLES = """examples:
  simba-lab eval --checkpoint runs/base --arms dense linear:global_impact@0.55
  simba-lab eval --checkpoint runs/base --arms linear:my_criteria.OpenGate@0.55 --windows 200
  simba-lab eval --checkpoint state-spaces/mamba-130m --source 'books/*.jsonl.bz2' --dtype bf16
  simba-lab eval --checkpoint runs/base --tasks paper6 --arms dense,linear:global_impact@0.55,linear:recency@0.55
  simba-lab eval --checkpoint runs/base --tasks simba_lab_hellaswag,my_tasks/quiz.yaml --limit all
  simba-lab eval --checkpoint experiments/shipped/7m --tasks paper6 --line-width 70     (its books break lines at 70)
  simba-lab eval --compare runs/eval/base/results.json runs/eval/other/results.json
Arms of different FLOPs stand side by side here; `simba-lab sweep` compares them at one budget. The same command with
--tasks goes on where it was interrupted. --compare pairs the arms that both files name alike or, if there are none,
every arm of the second file with the first arm of the first."""

ARMS = ["dense", "linear:global_impact@0.55"]
REQUIRED = "give --checkpoint MODEL, or --compare with two result files"
# Options of one kind of evaluation, with their defaults: refused beside another kind, where they would do nothing.
WINDOW_OPTIONS = {"source": None, "split": "test", "windows": 200, "n_context": 960, "n_suffix": 64, "reach": None}
TASK_OPTIONS = {"limit": "300", "line_width": 0, "out": None}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--checkpoint", metavar="MODEL",
        help="a run folder, a .ckpt, a state-spaces or transformers folder, or a name on the hub")  # fmt: skip
    add("--arms", metavar="ARM", nargs="+", default=ARMS,
        help="dense or schedule:criterion@mean_keep, apart by spaces or commas "
        f"(default: {' '.join(ARMS)})")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="N", help="windows or contexts at once (default: %(default)s)")
    add("--device", default="auto", metavar="NAME", help="of torch: cpu, cuda, cuda:1; auto (default): a GPU if any")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: what the file has)")
    _configure_windows(parser.add_argument_group("held-out windows, unless --tasks is given"))
    _configure_tasks(parser.add_argument_group("tasks of the evaluation harness"))


def _configure_windows(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--source", metavar="TEXT", help="text to read, as data.source of an experiment; default: the "
        "run's own data, and for a model from elsewhere stdlib, the embedded corpus")  # fmt: skip
    group.add_argument("--split", choices=("test", "validation"), help=f"held-out split (default: {_default('split')})")
    for name, text in (
        ("windows", "windows at most"),
        ("n_context", "context tokens"),
        ("n_suffix", "suffix tokens, which are scored"),
    ):
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=int, metavar="N", help=f"{text} (default: {_default(name)})")
    group.add_argument("--reach", type=int, metavar="N", help="far tokens were last seen further back than this from "
        "the end of the context (default: half of it)")  # fmt: skip


def _configure_tasks(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", metavar="TASKS", help="paper6 (six benchmarks, offline), tasks or groups by name, "
        "YAML files, folders of tasks; apart by commas")  # fmt: skip
    group.add_argument("--limit", metavar="N", help="documents of each task, evenly spread; 0 or all takes every one "
        f"(default: {_default('limit')})")  # fmt: skip
    group.add_argument("--line-width", type=int, metavar="N", help="paper6 and its tasks in lines of at most N "
        "characters, as a model of books knows them; results go to widthN below their folder; 0, the default, as "
        "published")  # fmt: skip
    group.add_argument("--out", type=Path, metavar="FOLDER", help="where results are kept (default: runs/eval/NAME of "
        "the checkpoint)")  # fmt: skip
    group.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="no evaluation: the paired "
        "differences of two result files, B - A")  # fmt: skip


def _default(name: str) -> Any:
    return (WINDOW_OPTIONS | TASK_OPTIONS)[name]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate and print; the result is everything printed, and every document's scores."""
    if args.compare:
        _refuse_others(args, "--compare", [*WINDOW_OPTIONS, *TASK_OPTIONS, "checkpoint", "tasks"])
        from simba_lab.cli.eval_tasks import compare_files

        return compare_files(*args.compare)
    if args.checkpoint is None:
        raise InputError(REQUIRED)
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    args.arms = [name for text in args.arms for name in text.split(",") if name]
    if args.tasks is None:
        _refuse_others(args, "an evaluation on windows", TASK_OPTIONS)
        return _windows(_with_defaults(args, WINDOW_OPTIONS))
    _refuse_others(args, "--tasks", WINDOW_OPTIONS)
    from simba_lab.cli.eval_tasks import run_tasks

    return run_tasks(_with_defaults(args, TASK_OPTIONS))


def _refuse_others(args: argparse.Namespace, kind: str, names: Any) -> None:
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} means nothing beside {kind}; leave it out")


def _with_defaults(args: argparse.Namespace, defaults: dict[str, Any]) -> argparse.Namespace:
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | defaults | given)


def _windows(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.checkpoint import load
    from simba_lab.evaluate.arguments import read_device
    from simba_lab.evaluate.arms import evaluate_arms
    from simba_lab.kernels.cost import CONVENTION

    device = read_device(args.device)
    model = load(args.checkpoint, dtype=args.dtype).to(device)
    data = held_out_data(args.checkpoint, args.source)
    windows = data.eval_windows(args.split, args.n_context, args.n_suffix, args.windows)
    reach = args.n_context // 2 if args.reach is None else args.reach
    rows = evaluate_arms(model, args.arms, windows, args.batch_size, reach, lambda line: print(line, flush=True))
    _print(rows, len(windows), args.split, reach)
    return {
        "arms": rows, "windows": len(windows), "split": args.split, "reach": reach, "device": str(device),
        "backend": model.backend.name, "convention": CONVENTION,
    }  # fmt: skip


def held_out_data(checkpoint: str, source: str | None) -> TextData:
    """The data of the checkpoint's run or, read with the checkpoint's tokenizer, ``source``."""
    from simba_lab.checkpoint import SPEC_FILE, tokenizer_path
    from simba_lab.data import TextData
    from simba_lab.training import CONFIG_FILE, read_experiment

    folder = Path(checkpoint)
    if source is None and (folder / CONFIG_FILE).is_file():
        return read_experiment(folder / CONFIG_FILE).data
    if source is None and ((folder / SPEC_FILE).is_file() or folder.is_file()):
        raise InputError(
            f"--checkpoint: {checkpoint} has no {CONFIG_FILE}, so its data is not known; name a text with --source"
        )
    return TextData("stdlib" if source is None else source, tokenizer=str(tokenizer_path(checkpoint)))


def _print(rows: list[dict[str, Any]], windows: int, split: str, reach: int) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = f"{windows} {split} windows; NLL in nats per token; far: last seen more than {reach} tokens back"
    table = Table(caption=caption)
    for column in ("arm", "NLL", "95 % interval", "far NLL", "GFLOPs/window", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for row in rows:
        interval, far = row["quality_interval"], row["quality_far"]
        table.add_row(
            row["name"],
            f"{row['quality']:.4f}",
            "none" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            "none" if far is None else f"{far:.4f}",
            f"{row['flops'] / 1e9:.3f}",
            f"{row['wall_seconds']:.1f}",
        )
    Console().print(table)
