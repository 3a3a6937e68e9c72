"""``simba-lab bench``: a training step of ours beside other implementations, in one run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simba_lab.bench.cpu import BASELINE, Plan, compare
from simba_lab.bench.peers import Shape, option
from simba_lab.bench.prefill import compare_prefill

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """examples:
  simba-lab bench cpu --skip transformers --json bench.json
  simba-lab bench cpu                                  (transformers alone may take minutes)
  simba-lab bench cpu --length 2048 --batch 1 --repeats 5 --include-reference
  simba-lab bench prefill --length 2048                (dense against pruned linearly to 10 %)
"""
HELP = {
    "d_model": "width of the model",
    "n_layer": "layers",
    "d_state": "states per channel",
    "vocab_size": "vocabulary",
    "batch": "sequences in the batch",
    "length": "tokens in a sequence",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``bench``."""
    parser.description = (
        "Times one training step (forward and backward, fp32, no optimizer), each implementation in its own process. "
        "Before any timing our fast backend must agree with the readable reference."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("target", choices=["cpu", "prefill"], help="training step beside peers, or pruned prefill")
    for field in dataclasses.fields(Shape):
        text = f"{HELP[field.name]} (%(default)s)"
        parser.add_argument(option(field.name), type=int, default=field.default, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, after one warm-up (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of each implementation (all cores)")
    parser.add_argument(
        "--skip", action="append", default=[], choices=["mambapy", "transformers"], help="leave out (repeatable)"
    )
    parser.add_argument("--include-reference", action="store_true", help="also time our readable reference, slow")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens (%(default)s)")
    parser.add_argument("--criterion", default="global_impact", help="prefill: how tokens are scored (%(default)s)")
    parser.add_argument("--final-keep", type=float, default=0.1, help="prefill: share kept at the top (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, return the measurements."""
    from rich.console import Console

    plan = Plan(
        shape=Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)}),
        repeats=args.repeats,
        threads=args.threads,
        skip=tuple(args.skip),
        include_reference=args.include_reference,
        seed=args.seed,
    )
    console = Console()
    if args.target == "prefill":
        result = _with_progress(
            lambda show: compare_prefill(
                plan.shape, plan.shape.length, args.criterion, args.final_keep, 4 * plan.repeats, show
            )
        )
        console.print(_prefill_line(result), highlight=False)
        return result
    result = _with_progress(lambda show: compare(plan, show))
    console.print(_table(result))
    if result["speedup_over_mambapy"] is not None:
        console.print(f"simba_lab is {result['speedup_over_mambapy']:.1f} times as fast as {BASELINE}")
    return result


def _prefill_line(result: dict[str, Any]) -> str:
    shape = result["shape"]
    return (
        f"prefill of {shape['batch']} x {shape['length']} tokens: dense {result['dense_seconds']:.3f} s, "
        f"pruned {result['pruned_seconds']:.3f} s: {result['speedup']:.2f} times as fast; "
        f"FLOPs promise {result['promised_by_flops']:.2f}, {result['fraction']:.2f} of that was reached "
        f"(median of {result['repeats']} pairs, load {result['machine']['load_1min']})"
    )


def _with_progress(measure: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    """A measurement with a clock on standard error that says what is running."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("starting", total=None)

        def show(name: str) -> None:
            progress.reset(current, description=name, total=None)

        return measure(show)


def _table(result: dict[str, Any]) -> Table:
    from rich.table import Table

    shape, machine = result["shape"], result["machine"]
    title = ", ".join(f"{key} {value}" for key, value in shape.items())
    caption = f"{machine['cpu']}, {result['threads']} threads, torch {machine['torch']}, load {machine['load_1min']}"
    table = Table(title=f"training step: {title}", caption=f"{result['convention']}\n{caption}")
    for heading in ("implementation", "version"):
        table.add_column(heading)
    for heading in ("s/step", "min - max (steps)", "tokens/s", "peak memory", "parameters", "loss"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        if "skipped" in row:
            table.add_row(row["implementation"], row["skipped"])
        else:
            table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["implementation"],
        row["version"],
        f"{row['seconds_per_step']:.3f}",
        f"{row['seconds_min']:.3f} - {row['seconds_max']:.3f} ({row['repeats']})",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        f"{row['parameters']:,}",
        f"{row['loss']:.3f}",
    ]
