"""``simba-lab sensitivity``: what pruning costs by the layer at which it begins, and the keep schedule made of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simba_lab.evaluate.sensitivity import Sensitivity

EXAMPLES = """examples:
  simba-lab sensitivity --checkpoint runs/base --json sensitivity.json
  simba-lab sensitivity --checkpoint runs/base --rates 0.5 0.2 0.05 --windows 32 --reach 480
  simba-lab sensitivity --checkpoint runs/base --criterion query_impact --source 'books/*.jsonl.bz2'
  simba-lab sensitivity --checkpoint runs/ladder/12m-recall --criterion recency --rates 0.07 --recall sentence \
    --distance 700 --windows 32                   # which layer looks facts up
The entry `schedule` of the JSON file is a keep schedule for a sweep file or --schedule: `calibrated`, whose free
parameter the budget solves."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sensitivity``."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--checkpoint", metavar="MODEL", required=True,
        help="a run folder, a .ckpt, a state-spaces or transformers folder, or a name on the hub")  # fmt: skip
    add("--source", metavar="TEXT", help="text to read, as data.source of an experiment; default: the run's own data")
    add("--criterion", metavar="NAME", default="global_impact", help="name or class path (default: %(default)s)")
    add("--rates", type=float, nargs="+", default=[0.5, 0.25, 0.1], metavar="SHARE",
        help="shares of the context that go on, falling (default: %(default)s)")  # fmt: skip
    add("--protect-recent", type=float, default=0.0, metavar="SHARE", help="newest share of the kept (default: 0)")
    add("--split", choices=("test", "validation"), default="validation", help="held-out split (default: %(default)s)")
    for name, default, text in (
        ("windows", 64, "windows at most"), ("n-context", 960, "context tokens"), ("n-suffix", 64, "suffix tokens"),
        ("batch-size", 8, "windows at once"),
    ):  # fmt: skip
        add(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    add("--reach", type=int, metavar="N", help="count only tokens last seen further back than this before the suffix")
    add("--recall", choices=("sentence", "pair", "passage"),
        help="plant something to recall in every window and count only the answer")  # fmt: skip
    add("--distance", type=int, default=700, metavar="N",
        help="with --recall: tokens between what is planted and the question (default: %(default)s)")  # fmt: skip
    add("--facts", type=int, default=1, metavar="N", help="with --recall: facts planted together (default: 1)")
    add("--device", default="auto", metavar="NAME", help="of torch: cpu, cuda, cuda:1; auto (default): a GPU if any")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: what the file has)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, return it with the schedule made of it."""
    from rich.console import Console
    from rich.progress import Progress

    from simba_lab.checkpoint import load
    from simba_lab.cli.eval import held_out_data
    from simba_lab.data.recall_windows import plant
    from simba_lab.errors import InputError
    from simba_lab.evaluate.arguments import read_device
    from simba_lab.evaluate.sensitivity import layer_sensitivity

    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    model = load(args.checkpoint, dtype=args.dtype).to(read_device(args.device))
    data = held_out_data(args.checkpoint, args.source)
    windows = data.eval_windows(args.split, args.n_context, args.n_suffix, args.windows)
    if args.recall:
        windows = plant(windows, data.tokenizer, args.distance, args.recall, args.facts)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("passes", total=None)
        found = layer_sensitivity(
            model, windows, args.rates, args.criterion, args.protect_recent, args.batch_size, args.reach,
            lambda done, of: bar.update(task, completed=done, total=of),
        )  # fmt: skip
    _print(found, args.recall)
    planted = {"form": args.recall, "distance": args.distance, "facts": args.facts} if args.recall else None
    about = {"split": args.split, "checkpoint": args.checkpoint, "backend": model.backend.name}
    return found.to_dict() | {"recall": planted} | about


def _print(found: Sensitivity, recall: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    caption = f"rise of the suffix NLL over dense ({found.dense:.4f}), 10^-3 nats/token; {found.windows} windows"
    table = Table(caption=caption)
    table.add_column("pruned after layer", justify="right")
    for rate in found.rates:
        table.add_column(f"keep {rate:g}", justify="right")
    for layer, rises in enumerate(found.rise):
        table.add_row(str(layer), *(f"{1000 * rise:+.1f}" for rise in rises))
    Console().print(table)
    if recall and found.reading_layer is not None:
        Console().print(f"looked up in layer {found.reading_layer}: what lookahead_impact calls its layer")
