"""The flags that describe pruning, the same in every command that takes them, and the plan they describe."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simba_lab.errors import InputError
from simba_lab.pruning import CRITERIA, SCHEDULES, PruningPlan, build_schedule
from simba_lab.pruning.plan import CONVOLUTIONS

ALONE = ("criterion", "schedule", "mean_keep", "final_keep", "protect_recent", "convolution")


def configure_pruning(group: argparse._ArgumentGroup) -> None:
    """Add the flags to a group of a command's parser."""
    spec = "name, class path, or JSON with class_path and init_args"
    group.add_argument("--criterion", metavar="SPEC", help=f"{', '.join(CRITERIA.names())}: {spec} (global_impact)")
    group.add_argument("--schedule", metavar="SPEC", help=f"{', '.join(SCHEDULES.names())}: {spec} (linear)")
    group.add_argument("--mean-keep", type=float, metavar="SHARE", help="mean share of the context over the layers")
    group.add_argument("--final-keep", type=float, metavar="SHARE", help="share entering the last layer")
    group.add_argument(
        "--schedule-arg", action="append", default=[], metavar="KEY=VALUE", help="option of the schedule (repeatable)"
    )
    group.add_argument(
        "--protect-recent", type=float, metavar="SHARE", help="share of the kept set that is its newest tokens (0)"
    )
    group.add_argument(
        "--convolution", choices=CONVOLUTIONS,
        help="what a convolution reads beside a token whose neighbours are gone: whatever stands there, or nothing "
        "(compacted)",
    )  # fmt: skip


def described_plan(args: argparse.Namespace, n_layer: int, n_context: int = 1) -> PruningPlan | None:
    """The plan the flags describe, for a model of ``n_layer`` layers; None if none of them is given.

    Raises InputError that names the flag, also for a schedule that lacks its parameter or cannot be counted on
    ``n_context`` tokens.
    """
    if all(getattr(args, key) is None for key in ALONE) and not args.schedule_arg:
        return None
    options = _options(args.schedule_arg)
    if args.final_keep is not None:
        options["final_keep"] = args.final_keep
    with blaming("--criterion"):
        criterion = CRITERIA.build(_spec(args.criterion or "global_impact"))
    also = [flag(key) for key in ("final_keep", "schedule_arg") if getattr(args, key) not in (None, [])]
    with blaming("--schedule", *also):
        schedule = build_schedule(_spec(args.schedule or "linear"), **options)
        if args.mean_keep is None:
            schedule.counts(n_layer, n_context)
    with blaming("--mean-keep"):
        plan = PruningPlan.build(n_layer, criterion, schedule, args.mean_keep, **_only(options, schedule.knob))
    with blaming("--protect-recent"):
        plan = dataclasses.replace(plan, protect_recent=args.protect_recent or 0.0)
    return dataclasses.replace(plan, convolution=args.convolution or "compacted")


def flag(key: str) -> str:
    """``--final-keep`` for ``final_keep``."""
    return f"--{key.replace('_', '-')}"


@contextmanager
def blaming(*flags: str) -> Iterator[None]:
    """Errors of the values of these flags name them."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{' / '.join(flags)}: {error}") from None


def _only(options: dict[str, Any], key: str) -> dict[str, Any]:
    return {key: options[key]} if key in options else {}


def _spec(text: str) -> str | dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"expected a JSON object with class_path and init_args: {error}") from None


def _options(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; values are JSON, or text if they are not."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--schedule-arg: expected KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
