"""The page of ``simba-lab inspect``: one file that needs no network, its text shown by a script that runs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from simba_lab.errors import InputError
from simba_lab.files import writing
from simba_lab.report.assets import asset
from simba_lab.report.frame import page
from simba_lab.report.highway_figures import highway_figures
from simba_lab.report.markup import escape, facts, figures
from simba_lab.report.thinning import LIMIT
from simba_lab.report.wording import gflops, shortened

_DIGITS = 4
_EYEBROW = "simba_lab inspection: which tokens are dropped, and where"
_SECTIONS = [
    ("text-section", "The text"),
    ("groups-section", "What is kept"),
    ("highways", "Highways"),
    ("made", "How it was made"),
]

Inspection = Mapping[str, Any]


def write_inspection(inspection: Inspection, target: Path) -> int:
    """Write the page of what ``simba-lab inspect`` found and return its size in bytes.

    A page that would exceed 3 MB shows the scores of every second layer only, then of every fourth, and so on, and
    says so. Raises InputError, and writes nothing, if it is too long even without scores.
    """
    text = _within_limit(inspection).encode()
    with writing(target) as partial:
        partial.write_bytes(text)
    return len(text)


def _within_limit(inspection: Inspection) -> str:
    highways = _highways(inspection)
    for every in (1, 2, 4, 8, 16, 32, 64, None):
        text = _render(inspection, highways, every)
        if len(text.encode()) <= LIMIT:
            return text
    tokens = inspection["n_context"] + inspection["n_suffix"]
    raise InputError(
        f"--n-context: {tokens:,} tokens of {len(inspection['arms'])} arms take more than {LIMIT // 10**6} MB of page; "
        "lower it, or name fewer --arms"
    )


def _render(inspection: Inspection, highways: str, every: int | None) -> str:
    """The page with the scores of every ``every``-th layer; None: of none."""
    notes = [*inspection["notes"], *_thinned(every)]
    body = Template(asset("inspection.html")).substitute(
        data=_data_block(_shown(inspection, every)),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in notes),
        highways=highways,
        last=inspection["n_layer"] - 1,
        facts=_facts(inspection),
    )
    heading = shortened(inspection["source"], 80)
    title, assets = f"{heading}: dropped tokens", ("report", "inspection")
    return page(heading, _made(inspection), _SECTIONS, body, _EYEBROW, title, assets)


def _thinned(every: int | None) -> list[str]:
    if every == 1:
        return []
    which = "of no layer" if every is None else f"of every {every}th scored layer"
    return [f"To keep this page small it holds the scores {which.replace('2th', '2nd')}; --json FILE holds all."]


def _shown(inspection: Inspection, every: int | None) -> dict[str, Any]:
    """What the script needs: scores to four digits, of some layers."""
    arms = []
    for arm in inspection["arms"]:
        layers = list(arm["scores"])[::every] if every else []
        scores = {layer: [_rounded(score) for score in arm["scores"][layer]] for layer in layers}
        arms.append({**arm, "scores": scores, "suffix_nll": [_rounded(nll) for nll in arm["suffix_nll"]]})
        arms[-1]["gflops"] = gflops(arm["flops"])
    keys = ("n_context", "n_suffix", "n_layer", "tokens", "views")
    dense = [_rounded(nll) for nll in inspection["dense_suffix_nll"]]
    return {key: inspection[key] for key in keys} | {"arms": arms, "dense_suffix_nll": dense}


def _rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON has no number for."""
    return float(f"{value:.{_DIGITS}g}") if abs(value) < float("inf") else None


def _data_block(data: Any) -> str:
    """JSON that can stand in a script element: without ``<`` nothing in it can end that element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _made(inspection: Inspection) -> str:
    lengths = f"{inspection['n_context']:,} context + {inspection['n_suffix']:,} suffix tokens"
    return f"{inspection['checkpoint']} \N{MIDDLE DOT} {inspection['n_layer']} layers \N{MIDDLE DOT} {lengths}"


def _highways(inspection: Inspection) -> str:
    """The section of measurements; a hint how to get it where there is none."""
    if inspection["highways"] is None:
        return '<p class="note">Not measured: <code>simba-lab inspect --flow</code> adds it.</p>'
    return figures(highway_figures(inspection["highways"]))


def _facts(inspection: Inspection) -> str:
    """How the page was made: command, model, versions."""
    pairs = {
        "command": inspection["command"],
        "model": f"{inspection['checkpoint']}, {inspection['layer']}, {inspection['n_layer']} layers",
        "ran on": f"{inspection['device']}, backend {inspection['backend']}",
        **inspection["environment"],
    }
    return facts(pairs.items())
