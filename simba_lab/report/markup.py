"""The pieces that every section of a page is put together from; whatever comes from a file is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from simba_lab.report.drawing import Figure
from simba_lab.report.wording import inert

_PLAIN = "/,:;()=@!*+$?"
"""What may stand unchanged in the data address of a download, beside letters, digits and ``_.-~``."""


def escape(text: object) -> str:
    """Inert HTML text, safe in an element and in a quoted attribute."""
    return html.escape(inert(text), quote=True)


def breakable(name: str) -> str:
    """A name that a narrow column breaks after a slash or underscore, isolated from the direction of its neighbours."""
    return f"<bdi>{escape(name).replace('/', '/<wbr>').replace('_', '_<wbr>').replace(':', ':<wbr>')}</bdi>"


def section(key: str, title: str, body: str) -> str:
    """A section with its heading; nothing where there is no body."""
    if not body:
        return ""
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">\n<h2 id="{key}-title">{escape(title)}</h2>\n'
        f"{body}\n</section>"
    )


def table(name: str, caption: str, heads: Iterable[tuple[str, str, str]], rows: str, sorted_by: str = "") -> str:
    """A table whose columns sort by their heading's button; heads are (title, "text" or "number", HTML note)."""
    cells = "".join(
        f'<th scope="col" data-type="{kind}" aria-sort="{"ascending" if title == sorted_by else "none"}">'
        f'<button type="button">{title}</button><small>{note}</small></th>'
        for title, kind, note in heads
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {name}">'
        f'<table id="{name}" aria-describedby="{name}-note">'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        f'<p class="note" id="{name}-note">{caption}</p>'
    )


def figure_section(figure: Figure) -> str:
    """A figure with its caption and downloads; the SVG and PNG are made from the picture on the page by the script."""
    return (
        f'<figure id="figure-{figure.key}"><h3>{escape(figure.title)}</h3>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="figure: {escape(figure.title)}">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f'<p class="downloads"><button type="button" data-save="svg" data-name="{figure.key}" hidden>SVG</button>'
        f'<button type="button" data-save="png" data-name="{figure.key}" hidden>PNG</button>'
        f"{download(f'{figure.key}.csv', 'text/csv', figure.csv, 'CSV')}</p></figure>"
    )


def figures(made: Iterable[Figure | None]) -> str:
    return "\n".join(figure_section(figure) for figure in made if figure is not None)


def download(name: str, kind: str, text: str, label: str) -> str:
    """A link that saves `text`, which travels inside the page."""
    address = f"data:{kind};charset=utf-8,{quote(text, safe=_PLAIN)}"
    return f'<a download="{escape(name)}" href="{address}">{escape(label)}</a>'


def facts(pairs: Iterable[tuple[str, Any]], short: bool = False) -> str:
    """Names and values; `short` ones stand in several columns."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts{" short" if short else ""}">{items}</dl>'


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def block(text: str) -> str:
    """Preformatted text that scrolls by keyboard too."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def data_block(value: Any) -> str:
    return block(json.dumps(value, indent=2, ensure_ascii=False))
