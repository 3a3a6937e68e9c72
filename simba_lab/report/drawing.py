"""From a matplotlib figure to an SVG that fits a light page, a dark page and a greyscale print.

Lines and text that carry no colour of their own are drawn in a sentinel colour that becomes `currentColor`, so they
take the page's text colour; the report's colours become variables of the page, with themselves for a picture that is
saved apart from it. Text stays text: it can be searched, selected and restyled.
"""

from __future__ import annotations

import csv
import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simba_lab.report.wording import inert

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INK = "#010203"
# Okabe and Ito's colours without the yellow, which is lost on white. A dark page has lighter ones of the same order.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH = 10.5  # inches; with 9 point text, what a page of 1100 pixels shows at about 13 pixels

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "font.family": ["DejaVu Sans"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
    "lines.markersize": 7,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK)


# A matplotlib figure, and the text shown when the pointer rests on the artist of a gid.
Drawn = tuple["Canvas", dict[str, str]]


@dataclass(frozen=True)
class Figure:
    """A finished figure: SVG text, a caption that defines what is drawn, and the numbers behind it as CSV text."""

    key: str
    title: str
    caption: str
    svg: str
    csv: str


def draw(key: str, label: str, build: Callable[[], Drawn]) -> str:
    """Run `build` under the report's style and return its SVG, the same text for the same numbers.

    Args:
        key: prefix of every id inside, since several figures share one page.
        label: the figure's accessible name.
        build: makes the figure; also maps an artist's gid to the text shown when the pointer rests on it.
    """
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # The browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph")
        figure, hints = build()
        buffer = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _for_a_page(buffer.getvalue(), key, label, hints)


def canvas(width: float, height: float) -> Canvas:
    """An empty figure of `width` x `height` inches, apart from pyplot and its global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def tall_enough(height: float, entries: int) -> float:
    """Inches of a figure whose legend has so many lines beside axes that would need only ``height``."""
    return max(height, 0.5 + 0.19 * entries)


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV text; a text cell that a spreadsheet would run as a formula is preceded by an apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = inert(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _for_a_page(svg: str, key: str, label: str, hints: Mapping[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s(?:width|height)="[^"]*pt"', "", svg, count=2)
    # A style element inside one figure would hold for the whole page; on the root element it is inherited instead.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, count=1, flags=re.S)
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", _FONTS)
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--c{number}, {colour})")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace("url(#", f"url(#{key}-")
    # Glyphs and markers are found inside the figure; a link leads to the page's own configurations.
    svg = re.sub(r'href="#(?!config-)', f'href="#{key}-', svg)
    for gid, hint in hints.items():
        opening = f'<g id="{key}-{gid}">'
        assert opening in svg, f"no artist is called {gid}"
        svg = svg.replace(opening, f"{opening}<title>{html.escape(inert(hint))}</title>", 1)
    name = html.escape(inert(label), quote=True)
    root = f'<svg role="img" aria-label="{name}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return svg.replace("<svg", root, 1).strip()
