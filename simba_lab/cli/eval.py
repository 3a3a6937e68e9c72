"""``simba-lab eval``: held-out quality of a model, dense and pruned, on windows of its run's data or of any text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simba_lab.data import TextData

EXAMPLES = """examples:
  simba-lab eval --checkpoint runs/base --arms dense linear:global_impact@0.55
  simba-lab eval --checkpoint runs/base --arms linear:my_criteria.OpenGate@0.55 --windows 200
  simba-lab eval --checkpoint state-spaces/mamba-130m --source 'books/*.jsonl.bz2' --dtype bf16
Arms of different FLOPs stand side by side here; `simba-lab sweep` compares them at one budget, with p-values."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("--checkpoint", metavar="MODEL", required=True,
        help="a run folder, a .ckpt, a state-spaces or transformers folder, or a name on the hub")  # fmt: skip
    add("--source", metavar="TEXT", help="text to read, as data.source of an experiment; default: the run's own data, "
        "and for a model from elsewhere stdlib, the embedded corpus")  # fmt: skip
    add("--arms", metavar="ARM", nargs="+", default=["dense", "linear:global_impact@0.55"],
        help="dense or schedule:criterion@mean_keep (default: %(default)s)")  # fmt: skip
    add("--split", choices=("test", "validation"), default="test", help="held-out split (default: %(default)s)")
    add("--windows", type=int, default=200, help="windows at most (default: %(default)s)")
    add("--n-context", type=int, default=960, help="context tokens (default: %(default)s)")
    add("--n-suffix", type=int, default=64, help="suffix tokens, which are scored (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="windows at once (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: what the file has)")
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

    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    device = _device(args.device)
    model = load(args.checkpoint, dtype=args.dtype).to(device)
    windows = held_out_data(args.checkpoint, args.source).eval_windows(args.split, args.n_context, args.n_suffix, args.windows)
    reach = args.n_context // 2 if args.reach is None else args.reach
    rows = evaluate_arms(model, args.arms, windows, args.batch_size, reach, lambda line: print(line, flush=True))
    _print(rows, len(windows), args.split, reach)
    return {
        "arms": rows, "windows": len(windows), "split": args.split, "reach": reach, "device": device,
        "backend": model.backend.name, "convention": CONVENTION,
    }  # fmt: skip


def _device(asked: str) -> str:
    import torch

    from simba_lab.errors import InputError

    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: torch {torch.__version__} sees no CUDA device here; use cpu or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def held_out_data(checkpoint: str, source: str | None) -> TextData:
    """The data of the checkpoint's run or, read with the checkpoint's tokenizer, ``source``."""
    from simba_lab.checkpoint import SPEC_FILE, tokenizer_path
    from simba_lab.data import TextData
    from simba_lab.errors import InputError
    from simba_lab.training import CONFIG_FILE, read_experiment

    folder = Path(checkpoint)
    if source is None and (folder / CONFIG_FILE).is_file():
        return read_experiment(folder / CONFIG_FILE).data
    if source is None and ((folder / SPEC_FILE).is_file() or folder.is_file()):
        raise InputError(
            f"--checkpoint: {checkpoint} has no {CONFIG_FILE}, so its data is not known; name a text with --source"
        )
    return TextData(source or "stdlib", tokenizer=str(tokenizer_path(checkpoint)))


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
