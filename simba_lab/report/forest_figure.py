"""Paired differences from the first arm as a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simba_lab.report.drawing import INK, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.folders import Comparison
from simba_lab.report.marks import Marks
from simba_lab.report.results import Arm, by_quality, differs_from_first
from simba_lab.report.thinning import drawn, told
from simba_lab.report.wording import kind_of, number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A run of ordinary spaces collapses to one in SVG text.
BLANK = "\u00a0"


def forest_figure(comparison: Comparison) -> Figure | None:
    """Paired differences from the first arm, plain and far, one row per arm."""
    results = comparison.results
    first, *others = results["arms"]
    every = [arm for arm in by_quality({"arms": others}) if arm["difference"] is not None]
    shown = {arm["name"] for arm in drawn(comparison)}
    rows = [arm for arm in every if arm["name"] in shown]
    if not rows:
        return None
    key, title = f"{comparison.prefix}forest", f"Paired differences from {shortened(first['name'])}"

    def build() -> Drawn:
        figure = canvas(WIDTH, 1.1 + 0.24 * len(rows))
        marks, hints = Marks(results["arms"]), {}
        plain, far = figure.subplots(1, 2, sharey=True)
        for axes, is_far, name in ((plain, False, "all suffix tokens"), (far, True, "far tokens")):
            hints |= _forest(axes, comparison, rows, is_far, marks)
            axes.set(title=name, xlabel=f"arm \u2212 first arm (nats/token)\n\u2190 better {8 * BLANK} worse \u2192")
        plain.set_yticks(range(len(rows)), [shortened(arm["name"]) for arm in rows])
        plain.set_ylim(len(rows) - 0.4, -0.6)
        return figure, hints

    return Figure(key, title, _caption(first) + told([comparison]), draw(key, title, build), _csv(every))


def _forest(axes: Axes, comparison: Comparison, arms: Sequence[Arm], far: bool, marks: Marks) -> dict[str, str]:
    key, hints = "difference_far" if far else "difference", {}
    axes.axvline(0, color=INK, linewidth=1)
    for row, arm in enumerate(arms):
        if arm[key] is None:
            continue
        look = marks.of(arm) | {"fillstyle": "full" if differs_from_first(arm, far) else "none"}
        gid = f"{key}-{row}"
        if arm[f"{key}_interval"]:
            axes.plot(arm[f"{key}_interval"], [row, row], color=look["color"], linewidth=1.8)
        (line,) = axes.plot([arm[key]], [row], linestyle="none", gid=gid, **look)
        line.set_url(f"#{comparison.anchor(arm)}")
        hints[gid] = f"{arm['name']} ({kind_of(arm)}): {number(arm[key], sign=True)} nats/token"
    return hints


def _caption(first: Arm) -> str:
    return (
        f"Each arm's NLL minus that of the first arm, {shortened(first['name'])} ({kind_of(first)}), window by window "
        "over the same windows, in nats/token; left of the line the arm predicts better. Bars are the paired bootstrap "
        "interval. A filled marker is a difference that may be claimed (Holm-corrected permutation p < 0.05 and an "
        "interval without zero), an open marker one that may not. Rows are ordered by plain NLL."
    )


def _csv(arms: Sequence[Arm]) -> str:
    columns, rows = ["arm"], [[arm["name"]] for arm in arms]
    for far in ("", "_far"):
        columns += [f"difference{far}", f"low{far}", f"high{far}", f"p_value{far}"]
        for row, arm in zip(rows, arms, strict=True):
            interval = arm[f"difference{far}_interval"] or (None, None)
            row += [arm[f"difference{far}"], *interval, arm[f"p_value{far}"]]
    return as_csv(columns, rows)
