"""``simba-lab flops``: what a model costs, by op and by layer, dense or pruned, checked by a second count."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from simba_lab.budget.accounting import UNIT, Account, Pass, account, readable
from simba_lab.checkpoint import load
from simba_lab.cli.pruning_flags import blaming, configure_pruning, described_plan, flag
from simba_lab.errors import InputError
from simba_lab.kernels.cost import CONVENTION
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import PUBLISHED, published_shape

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """examples:
  simba-lab flops --shape mamba-130m --n-context 2048 --n-suffix 64
  simba-lab flops --shape mamba-130m --n-context 2048 --n-suffix 64 --criterion global_impact --schedule linear \\
      --mean-keep 0.55 --json flops.json
  simba-lab flops --shape mamba-2.8b --n-context 2048 --criterion norm --schedule highway_top \\
      --schedule-arg keep=0.2 --schedule-arg from_layer=32 --training
  simba-lab flops --d-model 256 --n-layer 8 --vocab-size 4096 --n-context 1024 --schedule linear --final-keep 0.1
  simba-lab flops --checkpoint runs/base --n-context 960 --n-suffix 64 --criterion my_file.MyCriterion --mean-keep 0.5
  simba-lab flops --shape mamba-370m --n-context 2048 --mean-keep 0.55 \\
      --criterion '{"class_path": "global_impact", "init_args": {"reduce": "absmax"}}'
"""
SIZES = ("d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``flops``."""
    parser.description = f"FLOPs of a model by op and by layer, in closed form and counted by fvcore.\n{CONVENTION}"
    parser.epilog = EXAMPLES
    model = parser.add_argument_group("model: one of")
    model.add_argument("--shape", metavar="NAME", help=f"a published shape: {', '.join(PUBLISHED)}")
    model.add_argument("--checkpoint", metavar="PATH", help="a run folder or .ckpt, pruned as it was saved")
    for key in SIZES:
        needed = "needed" if key in SIZES[:3] else "otherwise the default"
        model.add_argument(flag(key), type=int, metavar="N", help=f"a shape of your own: {key} ({needed})")
    window = parser.add_argument_group("window")
    text = "tokens that may be pruned (%(default)s)"
    window.add_argument("--n-context", type=int, default=2048, metavar="T", help=text)
    window.add_argument("--n-suffix", type=int, default=0, metavar="S", help="dense tokens after them (%(default)s)")
    which = "logits of boundary and suffix, or of all that remain (%(default)s)"
    window.add_argument("--head", choices=["scored", "all"], default="scored", help=which)
    configure_pruning(parser.add_argument_group("pruning; any of these prunes"))
    parser.add_argument("--training", action="store_true", help="also forward + backward")
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="let fvcore count it too (on)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count, print tables, return the account as plain data."""
    if args.n_context < 1:
        raise InputError(f"--n-context must be at least 1, got {args.n_context}")
    if args.n_suffix < 0:
        raise InputError(f"--n-suffix must be at least 0, got {args.n_suffix}")
    model = _model(args)
    plan = described_plan(args, model.config.n_layer, args.n_context)
    model = model if plan is None else model.with_pruning(plan)
    result = account(model, args.n_context, args.n_suffix, args.head, args.verify)
    _show(result, args.training)
    return result.to_dict() | ({"training": result.training.to_dict()} if args.training else {})


def _model(args: argparse.Namespace) -> LanguageModel:
    sizes = {key: getattr(args, key) for key in SIZES if getattr(args, key) is not None}
    sources = [flag for flag in ("shape", "checkpoint") if getattr(args, flag) is not None]
    if len(sources) + bool(sizes) != 1:
        raise InputError("give one of --shape, --checkpoint, or sizes of your own (--d-model, --n-layer, --vocab-size)")
    if args.checkpoint is not None:
        with blaming("--checkpoint"):
            return load(args.checkpoint)
    return _without_weights(_own_shape(sizes) if sizes else _published(args.shape))


def _published(name: str) -> ModelConfig:
    with blaming("--shape"):
        return published_shape(name)


def _own_shape(sizes: dict[str, int]) -> ModelConfig:
    missing = [flag(key) for key in SIZES[:3] if key not in sizes]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be given too for a shape of your own")
    with blaming(*map(flag, sizes)):
        return ModelConfig(**sizes)


def _without_weights(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config, seed=None)


def _show(result: Account, training: bool) -> None:
    from rich.console import Console

    console = Console()
    console.print(_ops_table(result, training), _layers_table(result, training))
    config = result.model.config
    name = "dense" if result.model.pruning is None else result.model.pruning.name
    console.print(
        f"{name}, {config.n_layer} layers x {config.d_model}, {result.parameters:,} parameters; head on "
        f"{result.head} positions; mean keep {result.mean_keep:.4f}, final keep {result.final_keep:.4f}"
    )
    console.print(_total("inference", result.inference))
    if training:
        console.print(_total("training (forward + backward)", result.training))
    console.print(f"{UNIT}; {CONVENTION}", style="dim")
    ops = len(result.inference.flops.entries)
    console.print(
        f"fvcore counts the same in all {ops} (layer, op) pairs, to the last digit"
        if result.verified
        else "closed form only, not cross-checked (--no-verify)"
    )


def _total(kind: str, counted: Pass) -> str:
    total = counted.flops.total
    return f"{kind}: {total:,} FLOPs = {readable(total)} a window, {counted.share_of_dense:.4f} of dense"


def _ops_table(result: Account, training: bool) -> Table:
    return _table(result, training, "op", result.inference.ops(), result.training.ops(), {})


def _layers_table(result: Account, training: bool) -> Table:
    tokens = {str(layer): f"{count:,}" for layer, count in enumerate(result.tokens())}
    return _table(result, training, "layer", result.inference.layers(), result.training.layers(), tokens)


def _table(
    result: Account,
    training: bool,
    heading: str,
    inference: Iterator[tuple[str, int, float]],
    trained: Iterator[tuple[str, int, float]],
    tokens: dict[str, str],
) -> Table:
    from rich.table import Table

    title = f"FLOPs by {heading}, context {result.n_context:,} + suffix {result.n_suffix:,}"
    table = Table(heading, title=title)
    for column in (["tokens"] if tokens else []) + ["inference", "share"] + (["training", "share"] if training else []):
        table.add_column(column, justify="right")
    for (name, flops, share), (_, more, share_trained) in zip(inference, trained, strict=True):
        cells = [tokens.get(name, "")] if tokens else []
        cells += [f"{flops:,}", f"{share:.2%}"]
        table.add_row(name, *cells, *([f"{more:,}", f"{share_trained:.2%}"] if training else []))
    return table
