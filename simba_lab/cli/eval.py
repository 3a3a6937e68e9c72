"""``simba-lab eval``: held-out quality of a run's model, dense and pruned, on windows of the run's own data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  simba-lab eval --checkpoint runs/base --arms dense linear:global_impact@0.55
  simba-lab eval --checkpoint runs/base --arms linear:my_criteria.OpenGate@0.55 --windows 200
Arms of different FLOPs stand side by side here; `simba-lab sweep` compares them at one budget, with p-values."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--checkpoint", metavar="RUN", type=Path, required=True, help="a run folder of `simba-lab fit`")
    add("--arms", metavar="ARM", nargs="+", default=["dense", "linear:global_impact@0.55"],
        help="dense or schedule:criterion@mean_keep (default: %(default)s)")  # fmt: skip
    add("--split", choices=("test", "validation"), default="test", help="held-out split (default: %(default)s)")
    add("--windows", type=int, default=200, help="windows at most (default: %(default)s)")
    add("--n-context", type=int, default=960, help="context tokens (default: %(default)s)")
    add("--n-suffix", type=int, default=64, help="suffix tokens, which are scored (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="windows at once (default: %(default)s)")
    add(
        "--reach",
        type=int,
        default=None,
        help="far tokens were last seen further back than this from the end of the context (default: half of it)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.checkpoint import load
    from simba_lab.errors import InputError
    from simba_lab.evaluate.arms import evaluate_arms
    from simba_lab.kernels.cost import CONVENTION
    from simba_lab.training import CONFIG_FILE, read_experiment

    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    model = load(args.checkpoint)
    config = args.checkpoint / CONFIG_FILE
    if not config.is_file():
        raise InputError(f"--checkpoint: {args.checkpoint} has no {CONFIG_FILE}, so its data is not known")
    windows = read_experiment(config).data.eval_windows(args.split, args.n_context, args.n_suffix, args.windows)
    reach = args.n_context // 2 if args.reach is None else args.reach
    rows = evaluate_arms(model, args.arms, windows, args.batch_size, reach, lambda line: print(line, flush=True))
    _print(rows, len(windows), args.split, reach)
    return {"arms": rows, "windows": len(windows), "split": args.split, "reach": reach, "convention": CONVENTION}


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
