"""``simba-lab inspect``: which tokens of a text an arm drops at which layer, and how information flows past them."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError

if TYPE_CHECKING:
    from simba_lab.inspection import Passage
    from simba_lab.model import LanguageModel

EXAMPLES = """examples:
  simba-lab inspect --checkpoint runs/base --text-file notes.txt
  simba-lab inspect --checkpoint runs/base --passage 3 --flow --flow-windows 16 --out passage-3.html
  simba-lab inspect --checkpoint state-spaces/mamba-130m --text-file long.txt --n-context 2048 \\
      --arms linear:global_impact@0.55 linear:recency@0.55 linear:my_criteria.OpenGate@0.55 --json seen.json
The page is one file that needs no network. Arms of different FLOPs stand side by side here; `simba-lab sweep` compares
them at one budget."""
ARMS = ["linear:global_impact@0.55", "linear:recency@0.55"]
SECONDS_BETWEEN_LINES = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.epilog = EXAMPLES
    text = "run folder, .ckpt, state-spaces or transformers folder or hub name, a tokenizer.json beside it"
    parser.add_argument("--checkpoint", metavar="MODEL", required=True, help=text)
    _configure_text(parser.add_argument_group("text"))
    add = parser.add_argument
    add("--arms", metavar="ARM", nargs="+", default=ARMS,
        help="dense or schedule:criterion@mean_keep (default: %(default)s)")  # fmt: skip
    add("--out", metavar="FILE", type=Path, default=Path("inspect.html"), help="page to write (%(default)s)")
    add("--device", metavar="NAME", help="of torch (cuda where there is one, else cpu)")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: what the file has)")
    flow = parser.add_argument_group("highways")
    flow.add_argument("--flow", action="store_true", help="also measure redundancy, information flow and path length")
    text = "windows they are means over: of the text, or of the held-out data (%(default)s)"
    flow.add_argument("--flow-windows", type=int, default=4, metavar="N", help=text)
    text = "share of the context that a layer sees when its loss rise is measured (%(default)s)"
    flow.add_argument("--flow-keep", type=float, default=0.1, metavar="SHARE", help=text)


def _configure_text(group: argparse._ArgumentGroup) -> None:
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--text-file", metavar="FILE", type=Path, help="UTF-8 text, read from its beginning")
    text = "window N of those that `simba-lab eval` scores on the run's held-out data"
    which.add_argument("--passage", metavar="N", type=int, help=text)
    group.add_argument("--n-context", type=int, metavar="T", help="context tokens (960, less for a short text)")
    group.add_argument("--n-suffix", type=int, metavar="S", help="tokens after them (64, less for a short text)")
    text = "held-out split of --passage (%(default)s)"
    group.add_argument("--split", choices=("test", "validation"), default="test", help=text)
    group.add_argument("--windows", type=int, default=200, metavar="N", help="windows cut from it (%(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Inspect, write the page, return the same data."""
    from simba_lab.checkpoint import load
    from simba_lab.environment import command_line, describe
    from simba_lab.evaluate.arguments import read_device
    from simba_lab.inspection import inspect_tokens, measure_highways, parse_arms, work
    from simba_lab.report.inspection import write_inspection

    _check(args)
    model = load(args.checkpoint, dtype=args.dtype).to(read_device(args.device))
    arms = parse_arms(args.arms, model)
    passage, tokenizer = _passage(args, model)
    with _progress(len(arms) + (work(arms, passage) if args.flow else 0)) as say:
        result = inspect_tokens(arms, passage, tokenizer, say)
        result["highways"] = measure_highways(arms, passage, args.flow_keep, say) if args.flow else None
    result |= {
        "checkpoint": args.checkpoint,
        "n_layer": model.config.n_layer,
        "layer": model.config.layer,
        "device": str(model.device),
        "backend": model.backend.name,
        "command": command_line(),
        "environment": describe(),
    }
    size = write_inspection(result, args.out)
    print(f"{args.out}: {size / 1e6:.2f} MB")
    return result


def _check(args: argparse.Namespace) -> None:
    for name in ("n_context", "n_suffix", "windows", "flow_windows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < args.flow_keep <= 1:
        raise InputError(f"--flow-keep must lie in (0, 1], got {args.flow_keep}")
    if args.out.is_dir():
        raise InputError(f"--out: {args.out} is a folder; name a file")


def _passage(args: argparse.Namespace, model: LanguageModel) -> tuple[Passage, Any]:
    """What is inspected, and the tokenizer it is written in."""
    from simba_lab.cli.eval import held_out_data
    from simba_lab.cli.generate import checkpoint_tokenizer
    from simba_lab.inspection import from_held_out, from_text_file

    windows = args.flow_windows if args.flow else 1
    tokenizer = checkpoint_tokenizer(args.checkpoint, model)
    if args.text_file is not None:
        return from_text_file(args.text_file, tokenizer, args.n_context, args.n_suffix, windows), tokenizer
    data = held_out_data(args.checkpoint, None)
    lengths = (args.n_context, args.n_suffix)
    return from_held_out(data, args.split, args.passage, *lengths, args.windows, windows), tokenizer


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What is told each piece of work as it begins: a bar with ETA on a terminal, elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines(total).say
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        pieces = itertools.count()
        # The piece that a line announces is not done yet, those before it are.
        yield lambda line: bar.update(task, description=line, completed=next(pieces))


class _Lines:
    """Prints what is begun, and the time left, at most every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.last = time.monotonic()

    def say(self, line: str) -> None:
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            print(f"{line}  ({self._place(now)})", file=sys.stderr, flush=True)
        self.done += 1

    def _place(self, now: float) -> str:
        """What is done, and the time left once something is."""
        if not self.done:
            return f"0 of {self.total}"
        left = round((now - self.started) / self.done * (self.total - self.done))
        return f"{self.done} of {self.total}, {left // 60}:{left % 60:02d} left"
