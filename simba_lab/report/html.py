"""`report.html`: one file that needs no network, made from `results.json` alone."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from string import Template

from simba_lab.report.figures import all_figures
from simba_lab.report.results import Results, load_results
from simba_lab.report.sections import answer, arm_table, escape, figure_section, keep_table, limits, provenance


def write_report(results_path: Path) -> Path:
    """Write `report.html` beside `results_path` and return its path; an old report is replaced whole or not at all.

    Raises:
        InputError, BudgetMismatch: as `load_results`; nothing is written then.
    """
    page = render(load_results(results_path))
    target = results_path.with_name("report.html")
    unfinished = target.with_name(f".report-{os.getpid()}.html")
    try:
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def render(results: Results) -> str:
    """The page for checked results, the same text for the same results."""
    script = _part("report.js")
    return Template(_part("template.html")).substitute(
        title=escape(results["name"]),
        created=escape(results["created"]),
        policy=_policy(script),
        style=_part("report.css"),
        script=script,
        answer=answer(results),
        arms=arm_table(results),
        figures="\n".join(figure_section(figure) for figure in all_figures(results)),
        keep=keep_table(results),
        provenance=provenance(results),
        limits=limits(results),
    )


def _part(name: str) -> str:
    return (files("simba_lab.report") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Content security policy: this one script by its hash, nothing from outside, so text in data can never run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src 'sha256-{digest}'"
