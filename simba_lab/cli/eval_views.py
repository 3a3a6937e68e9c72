"""How ``simba-lab eval --tasks`` shows arms side by side, and what it says about them in words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.evaluate.benchmarks.compare import (
    AVERAGE,
    SAME,
    VERDICTS,
    Difference,
    average_cell,
    averaged,
    cell,
    columns,
)
from simba_lab.evaluate.benchmarks.scores import NATS, SHARE
from simba_lab.evaluate.benchmarks.store import ArmScores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE, UNBOUNDED = 180, 10_000
EQUAL = 0.005
"""FLOPs that differ by less are called equal, as in a sweep."""


def print_comparison(arms: Sequence[ArmScores], differences: Sequence[Difference]) -> dict[str, Any]:
    """Print values, other metrics, differences from the first arm and sentences; returns all of it as plain data."""
    shown = _print_values(arms)
    shown["other_metrics"] = _print_others(arms)
    return shown | _print_judgement(arms, differences)


def print_differences(arms: Sequence[ArmScores], differences: Sequence[Difference]) -> dict[str, Any]:
    """The same for arms of two files."""
    return _print_values(arms) | _print_judgement(arms, differences)


def _print_judgement(arms: Sequence[ArmScores], differences: Sequence[Difference]) -> dict[str, Any]:
    if differences:
        _print_differences(differences)
    sentences = [*_about_flops(arms), *_about_differences(differences)]
    for sentence in sentences:
        _console().print(sentence)
    return {"differences": [difference.as_record() for difference in differences], "sentences": sentences}


def _print_values(arms: Sequence[ArmScores]) -> dict[str, Any]:
    shown, first = columns(arms[0].tasks), arms[0]
    documents = {name: len(scores.doc_id) for name, scores in first.tasks.items()}
    headings = ["arm", *(_heading(task, metric) for task, metric in shown)]
    average = averaged(first.tasks)
    headings += ["average"] * average + ["MFLOPs per request", "times first arm's"]
    rows, table = [], []
    for arm in arms:
        cells = [cell(arm.tasks[task].metrics[metric]) for task, metric in shown]
        cells += [average_cell(arm.tasks)] if average else []
        relative = arm.per_request / first.per_request if first.per_request else 1.0
        rows.append([arm.name, *map(_cell_text, cells), f"{arm.per_request / 1e6:,.1f}", f"{relative:.3f}"])
        names = [f"{task} {metric}" for task, metric in shown] + [AVERAGE] * average
        flops = {"flops_per_request": arm.per_request, "relative_flops": relative}
        table.append({"arm": arm.name, "cells": dict(zip(names, cells, strict=True))} | flops)
    counts = ", ".join(f"{_short(name)} {count}" for name, count in documents.items())
    caption = f"Below each value its 95 % interval. Documents: {counts}."
    if average:
        caption += " The average counts each task the same, by its accuracy shown here."
    _print_table("", headings, rows, caption)
    return {"values": table, "documents": documents}


def _print_others(arms: Sequence[ArmScores]) -> list[dict[str, Any]]:
    """Metrics of the tasks that are not in the main table."""
    main = columns(arms[0].tasks)
    others = [(task, name) for task, scores in arms[0].tasks.items() for name in scores.metrics]
    others = [column for column in others if column not in main]
    found = [{f"{task} {name}": cell(arm.tasks[task].metrics[name]) for task, name in others} for arm in arms]
    if others:
        rows = [[arm.name, *map(_cell_text, cells.values())] for arm, cells in zip(arms, found, strict=True)]
        _print_table("Other metrics of the same tasks", ["arm", *(_heading(*column) for column in others)], rows, "")
    return [{"arm": arm.name, "cells": cells} for arm, cells in zip(arms, found, strict=True)]


def _print_differences(differences: Sequence[Difference]) -> None:
    keys = list(dict.fromkeys((difference.task, difference.metric) for difference in differences))
    arms = list(dict.fromkeys((difference.arm, difference.reference) for difference in differences))
    found = {(d.arm, d.reference, d.task, d.metric): d for d in differences}
    rows = [[f"{arm} - {other}", *(_difference_text(found[arm, other, *key]) for key in keys)] for arm, other in arms]
    caption = (
        "Over the same documents, 95 % interval by bootstrap; p by sign flips, Holm-corrected over all arms and "
        "columns (averages over the arms). Points of accuracy; perplexities as differences in nats (lower is better)."
    )
    _print_table("Paired differences", ["arms", *(_heading(*key) for key in keys)], rows, caption)


def _about_flops(arms: Sequence[ArmScores]) -> list[str]:
    first = arms[0]
    unequal = [arm for arm in arms if abs(arm.per_request - first.per_request) > EQUAL * first.per_request]
    if not unequal:
        return []
    shares = ", ".join(f"{arm.name} {arm.per_request / first.per_request:.2f}" for arm in unequal)
    return [f"FLOPs differ (times those of {first.name}): {shares}. For equal FLOPs use `simba-lab sweep`."]


def _about_differences(differences: Sequence[Difference]) -> list[str]:
    """What may be claimed of each arm, and what may not."""
    sentences = []
    for arm, reference in dict.fromkeys((difference.arm, difference.reference) for difference in differences):
        mine = [difference for difference in differences if (difference.arm, difference.reference) == (arm, reference)]
        parts = [_verdict(mine, verdict, reference) for verdict in VERDICTS]
        sentences.append(f"{arm}: {'; '.join(part for part in parts if part)}.")
    return sentences


def _verdict(differences: Sequence[Difference], verdict: str, reference: str) -> str:
    found = [difference for difference in differences if difference.verdict == verdict]
    if not found:
        return ""
    relation = f"{verdict} {'from' if verdict == SAME else 'than'} {reference}"
    if len(found) == len(differences):
        return f"{relation} on any column" if verdict == SAME else f"{relation} on every column"
    return f"{relation} on {', '.join(_where(difference) for difference in found)}"


def _where(difference: Difference) -> str:
    return "average" if difference.task == AVERAGE else f"{_short(difference.task)} {difference.metric}"


def _cell_text(found: dict[str, Any]) -> str:
    value, interval = found["value"], found["interval"]
    number = _percent if found["kind"] == SHARE else _number
    return number(value) if interval is None else f"{number(value)}\n{number(interval[0])}-{number(interval[1])}"


def _difference_text(difference: Difference) -> str:
    found, scale = difference.comparison, 100 if difference.kind == SHARE else 1
    digits = 3 if difference.kind == NATS else 1 if difference.kind == SHARE else 4
    if found.difference is None:
        return "none"
    text = f"{scale * found.difference:+.{digits}f}"
    if found.interval is None or found.p_value is None:
        return text
    low, high = (f"{scale * bound:+.{digits}f}" for bound in found.interval)
    p_value = "p<0.001" if found.p_value < 0.001 else f"p={found.p_value:.3f}"
    return f"{text}\n{low} {high}\n{p_value}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _heading(task: str, metric: str) -> str:
    """Broken at every underscore: a table of many tasks must fit."""
    words = _short(task).replace("_", "\n")
    return "average" if task == AVERAGE else f"{words}\n{'ppl' if metric == 'perplexity' else metric}"


def _short(task: str) -> str:
    return task.removeprefix("simba_lab_")


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Arms as rows; as columns where the terminal is too narrow for that."""
    console, table = _console(), _table(title, headings, rows, caption)
    if console.measure(table, options=console.options.update(width=UNBOUNDED)).maximum > console.width:
        turned = list(zip(*rows, strict=True))
        labels = [heading.replace("\n", " ") for heading in headings]
        lines = [[label, *values] for label, values in zip(labels[1:], turned[1:], strict=True)]
        table = _table(title, [labels[0], *turned[0]], lines, caption)
    console.print(table)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    from rich.table import Table

    table = Table(title=title or None, caption=caption or None, show_lines=True)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _console() -> Console:
    """As wide as the terminal; a file takes wide tables."""
    from rich.console import Console

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE
    return Console(width=width, markup=False, emoji=False, highlight=False)
