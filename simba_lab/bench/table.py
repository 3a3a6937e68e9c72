"""Markdown of bench results for the README: what was reached beside what was aimed at, and where it was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simba_lab.bench.lines import FIGURES
from simba_lab.errors import InputError

HEADINGS = ("measured", "ours", "peer", "figure", "target", "of the floor", "note")
BEGIN, END = "<!-- bench table -->", "<!-- end of bench table -->"
_MACHINE = ("gpu", "driver", "cuda", "torch", "triton", "mamba-ssm", "causal-conv1d")


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Results of ``bench kernels|prefill|train|decode --json``. Raises InputError naming a file that is none."""
    results = []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as the JSON of a bench: {error}") from None
        if not isinstance(content, dict) or not {"bench", "lines", "machine", "date"} <= content.keys():
            raise InputError(f"{path}: is not a result of bench kernels, prefill, train or decode with --json")
        results.append(content)
    return results


def markdown(results: Sequence[Mapping[str, Any]], aimed: bool = False) -> str:
    """A paragraph per place and date of measurement, then one table of all lines, or of those with an aim.

    Raises InputError for a result that no bench wrote.
    """
    try:
        sources = dict.fromkeys(source(result) for result in results)
        rows = [tuple(map(str, cells(line))) for line in _lines(results, aimed)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"bench table: not as bench writes it: {type(error).__name__} {str(error)[:80]}") from None
    table = [HEADINGS, ("---",) * len(HEADINGS), *rows]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n\n".join([*sources, "\n".join(body)]) + "\n"


def _lines(results: Sequence[Mapping[str, Any]], aimed: bool) -> list[Mapping[str, Any]]:
    return [line for result in results for line in result["lines"] if not aimed or line["target"] is not None]


def insert(text: str, path: Path) -> None:
    """Replaces what stands between the two markers in a file. Raises InputError if it lacks them."""
    content = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    before, start, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise InputError(f"{path}: must hold the markers {BEGIN} and {END}, in this order")
    Path(path).write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def source(result: Mapping[str, Any]) -> str:
    """GPU, versions and date of one result."""
    machine = result["machine"]
    known = [f"{key} {machine[key]}" if key != "gpu" else machine[key] for key in _MACHINE if key in machine]
    return f"Measured on {result['date']}: {', '.join(known)}."


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """One line under ``HEADINGS``."""
    return (
        line["what"],
        amount(line["ours"], line["unit"]),
        amount(line["theirs"], line["unit"]),
        figure(line),
        target(line),
        "" if line["fraction"] is None else f"{line['fraction']:.0%} ({line['floor']['bound'].replace('_', ' ')})",
        line["note"],
    )


def amount(value: float | None, unit: str) -> str:
    """A time or rate with three or four digits that matter."""
    if value is None:
        return ""
    text = f"{value:,.0f}" if unit == "tokens/s" or value >= 100 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return f"{text} {unit}"


def figure(line: Mapping[str, Any]) -> str:
    return "" if line["figure"] is None else FIGURES[line["figure_kind"]].format(line["figure"])


def target(line: Mapping[str, Any]) -> str:
    """What was aimed at, and whether it was reached."""
    if line["target"] is None:
        return ""
    aimed = FIGURES[line["figure_kind"]].format(line["target"]["value"]).removesuffix(" of FLOPs")
    text = f"{'at most' if line['target']['at_most'] else 'at least'} {aimed}"
    if "met" not in line:
        return text
    return f"{text}: {'met' if line['met'] else 'missed'}"
