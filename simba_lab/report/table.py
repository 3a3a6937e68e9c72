"""The table of arms for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simba_lab.report.results import Arm, Results, by_quality, differs_from_first, standing
from simba_lab.report.wording import gflops, half_width, inert, number, p_text, seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# The widest table, with names of up to 25 characters, fits this many columns.
WIDTH = 100
_MARKS = {"best": "*", "tied": "=", "unmatched": "!", "": " "}


def terminal_table(results: Results) -> Table:
    """All arms, best first, in at most 100 columns; differences are from the first arm of the file.

    Meaning does not hang on colour: the first column marks the best arm (*), arms not separable from it (=) and arms
    that cost more or less than the budget (!), and a difference that may not be claimed is in parentheses.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
        show_edge=False,
        title=Text(inert(results["name"])),
        caption=_caption(results),
    )
    table.caption_justify, table.title_justify = "left", "left"
    table.add_column("")
    table.add_column("arm", overflow="fold")
    for heading in _headings():
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in by_quality(results):
        place = standing(results, arm)
        style = {"best": "bold green", "unmatched": "dim"}.get(place, "")
        table.add_row(*(Text(cell) for cell in [_MARKS[place], inert(arm["name"]), *_cells(arm)]), style=style)
    return table


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the table and both conclusions; 100 columns wide where the output is not a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    console.print(terminal_table(results))
    for key in ("sentence", "far_sentence"):
        console.print(Text(inert(results["conclusion"][key])), highlight=False)


def _headings() -> list[str]:
    return ["GFLOPs", "NLL \u00b1", "far", "difference x1000", "p", "far x1000", "s"]


def _cells(arm: Arm) -> list[str]:
    return [
        gflops(arm["flops"]),
        _quality(arm),
        number(arm["quality_far"], 3),
        _difference(arm),
        p_text(arm["p_value"]),
        _claimed(number(_milli(arm["difference_far"]), 1, sign=True), arm, far=True),
        seconds(arm["wall_seconds"]),
    ]


def _quality(arm: Arm) -> str:
    half = half_width(arm["quality_interval"])
    return number(arm["quality"], 3) + (f"\u00b1{half:.3f}" if half is not None else "")


def _difference(arm: Arm) -> str:
    if arm["difference"] is None or arm["difference_interval"] is None:
        return number(_milli(arm["difference"]), 1, sign=True)
    low, high = (1000 * end for end in arm["difference_interval"])
    return _claimed(f"{1000 * arm['difference']:+.1f} [{low:+.1f}, {high:+.1f}]", arm)


def _claimed(text: str, arm: Arm, far: bool = False) -> str:
    known = arm[f"p_value{'_far' if far else ''}"] is not None
    return f"({text})" if known and not differs_from_first(arm, far) else text


def _milli(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _caption(results: Results) -> Any:
    from rich.text import Text

    first = inert(results["arms"][0]["name"])
    budget = f"{gflops(results['budget_flops'])} GFLOPs \u00b1{100 * results['tolerance']:g} %"
    lines = [
        f"* best, = not separable from the best, ! outside the budget of {budget} per window.",
        "NLL, and far: NLL of far tokens, in nats/token, lower is better.",
        f"x1000: arm - {first}, 10^-3 nats/token [interval]; in parentheses where not separable.",
        f"p: Holm-corrected. s: wall-clock seconds. {results['windows']} windows, {results['far_tokens']} far tokens.",
        inert(results["convention"]),
    ]
    return Text("\n".join(lines))
