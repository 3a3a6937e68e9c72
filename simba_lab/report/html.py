"""`report.html`: one file that needs no network, made from run folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from simba_lab.errors import InputError
from simba_lab.files import writing
from simba_lab.report.arm_tables import arm_table, keep_table
from simba_lab.report.context_figure import context_figure
from simba_lab.report.curve_figures import distance_figure, keep_figure, search_figure
from simba_lab.report.figures import flops_figure, seconds_figure
from simba_lab.report.folders import Comparison, Gathered, gather
from simba_lab.report.forest_figure import forest_figure
from simba_lab.report.frame import page
from simba_lab.report.importance import importance_figure
from simba_lab.report.markup import escape, figures, folded, section
from simba_lab.report.provenance import provenance
from simba_lab.report.sections import answer, left_out, limits
from simba_lab.report.thinning import LIMIT, versions

REPORT_FILE = "report.html"
_KEEP_COUNTS_LEFT_OUT = '<p class="note">The CSV of the keep curves holds the keep counts of every arm.</p>'


def write_report(*paths: Path, target: Path | None = None, allow_unequal: bool = False) -> Path:
    """Write the page of one or several run folders (or their results.json) and return its path.

    An old page is replaced whole or not at all.

    Args:
        target: the page; without one `report.html` in the folder of the only sweep, or above all of several.
        allow_unequal: arms of another budget are shown in a section of their own instead of refused.

    Raises:
        InputError, BudgetMismatch: as :func:`simba_lab.report.folders.gather` and :func:`within_limit`; nothing is
            written then.
    """
    target = target or default_target(paths)
    return write_page(gather(paths, target, allow_unequal), target)


def write_page(gathered: Gathered, target: Path) -> Path:
    text = within_limit(gathered)
    with writing(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


def within_limit(gathered: Gathered) -> str:
    """The page, with as much of large sweeps as 3 MB hold (:func:`simba_lab.report.thinning.versions`).

    Raises:
        InputError: it is too large even so; names the section that is.
    """
    for thinned in versions(gathered):
        text = render(thinned)
        if len(text.encode()) <= LIMIT:
            return text
    sizes = {title: len(body.encode()) for _, title, body in _sections(thinned)}
    largest = max(sizes, key=sizes.__getitem__)
    raise InputError(
        f"{REPORT_FILE}: {len(text.encode()) / 1e6:.1f} MB, it must stay under {LIMIT // 10**6}; the section "
        f"{largest!r} alone takes {sizes[largest] / 1e6:.1f} MB; name fewer folders, or look at their results.json"
    )


def default_target(paths: Sequence[Path]) -> Path:
    folders = [path.parent if path.is_file() else path for path in paths]
    if len(folders) == 1:
        return folders[0] / REPORT_FILE
    return Path(os.path.commonpath([folder.resolve() for folder in folders])) / REPORT_FILE


def render(gathered: Gathered) -> str:
    """The page, the same text for the same results."""
    parts = [(key, title, body) for key, title, body in _sections(gathered) if body]
    sweeps = gathered.comparisons + [one for one in gathered.unequal if not one.prefix.endswith("unequal-")]
    return page(
        " + ".join(one.name for one in sweeps),
        " / ".join(dict.fromkeys(str(one.results["created"]) for one in sweeps)),
        [(key, title) for key, title, _ in parts[1:]],  # the first needs no link from a line above it
        "\n".join(section(*part) for part in parts),
        eyebrow="simba_lab comparison at equal FLOPs",
    )


def _sections(gathered: Gathered) -> list[tuple[str, str, str]]:
    shown, everything = gathered.comparisons, gathered.comparisons + gathered.unequal

    def each(make: Callable[[Comparison], str], of: Sequence[Comparison] = shown) -> str:
        return _each(make, of, named=len(everything) > 1)

    return [
        ("answer", "The answer", each(answer)),
        ("left-out", "Left out", left_out(gathered.skipped)),
        ("arms-section", "Arms", each(arm_table)),
        ("flops", "Quality against FLOPs", figures(flops_figure(shown, face) for face in ("quality", "quality_far"))),
        ("seconds", "Quality against wall-clock", figures([seconds_figure(shown)])),
        ("keep-section", "Keep curves", each(_keep)),
        ("context", "Context length and distance", figures([context_figure(everything)]) + each(_distance)),
        ("differences", "Paired differences", each(lambda one: figures([forest_figure(one)]))),
        ("importance", "Importance of the parameters", each(_importance)),
        ("unequal", "Unequal budget", _unequal(gathered)),
        ("made", "How it was made", each(provenance, everything)),
        ("limits", "Limits", each(limits)),
    ]


def _each(make: Callable[[Comparison], str], comparisons: Sequence[Comparison], named: bool) -> str:
    parts = [(one, make(one)) for one in comparisons]
    head = '<h3 class="sweep"><bdi>{}</bdi></h3>'
    return "\n".join((head.format(escape(one.name)) if named else "") + part for one, part in parts if part)


def _keep(one: Comparison) -> str:
    shown = figures([keep_figure(one), search_figure(one)])
    counts = folded("Keep counts of every arm", keep_table(one)) if one.whole else _KEEP_COUNTS_LEFT_OUT
    return shown + counts if shown else ""


def _distance(one: Comparison) -> str:
    return figures([distance_figure(one)])


def _importance(one: Comparison) -> str:
    figure = importance_figure(one)
    if figure is None and one.results.get("search"):
        return "<p>The run folder holds no readable study with this search's trials, or too few of them finished.</p>"
    return figures([figure])


def _unequal(gathered: Gathered) -> str:
    if not gathered.unequal:
        return ""
    budget = gathered.comparisons[0].results["budget_flops"]
    told = (
        f"These arms do not cost the {budget:,} FLOPs per window of the comparison above, and no conclusion is drawn "
        "across the two. They are shown because --allow-unequal asked for it."
    )
    drawn = figures([flops_figure(gathered.comparisons + gathered.unequal, "quality", key="unequal-flops")])
    return f'<p class="warning">{told}</p>' + _each(arm_table, gathered.unequal, named=True) + drawn
