"""Quality against how many context tokens a model was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.curve_figures import telling
from simba_lab.report.drawing import INK, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.figures import Point, log_axis, marks_of, points_of
from simba_lab.report.folders import Comparison
from simba_lab.report.marks import Marks
from simba_lab.report.thinning import drawn
from simba_lab.report.wording import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHOLE_OR_SHORTENED = ("dense", "shorter_context")
# Arms of one context length stand side by side, this factor apart on the log axis.
_STEP = 1.018


def context_figure(comparisons: Sequence[Comparison]) -> Figure | None:
    """NLL against context length, plain and far; None unless arms were given contexts of different lengths.

    Several lengths come from a shorter-context arm, or from sweeps at several `n_context`.
    """
    points = points_of(comparisons, "quality", _context)
    if len({point.x for point in points}) < 2:
        return None
    key, title = "context", "Quality against context length"
    shown = _shown(comparisons)

    def build() -> Drawn:
        marks = marks_of(comparisons, [point for point in points if _is_shown(point, shown)])
        figure = canvas(WIDTH, marks.height(4.2))
        plain, far = figure.subplots(1, 2)
        hints = {}
        for axes, face, name in ((plain, "quality", "all suffix tokens"), (far, "quality_far", "far tokens")):
            drawn = [point for point in points_of(comparisons, face, _context) if _is_shown(point, shown)]
            hints |= _draw(axes, drawn, marks, face)
            axes.set(title=name, xlabel="context tokens (log)")
        plain.set_ylabel("NLL (nats/token), lower is better")
        marks.legend(figure)
        return figure, hints

    columns = ["sweep", "arm", "context", "flops", "quality", "low", "high", "quality_far", "far_low", "far_high"]
    table = as_csv(columns, [_row(point) for point in points])
    return Figure(key, title, _caption(comparisons, points, shown), draw(key, title, build), table)


def _context(arm: Any) -> int:
    """Context tokens that enter the arm's first layer; 0 if that was not recorded."""
    return arm["keep_counts"][0] if arm["keep_counts"] else 0


def _shown(comparisons: Sequence[Comparison]) -> set[tuple[int, str]]:
    return {(id(one), arm["name"]) for one in comparisons for arm in telling(one.results, drawn(one))}


def _is_shown(point: Point, shown: set[tuple[int, str]]) -> bool:
    return (id(point.owner), point.arm["name"]) in shown


def _draw(axes: Axes, points: Sequence[Point], marks: Marks, face: str) -> dict[str, str]:
    """Arms side by side, those of one name and as many windows joined over lengths; the hint of each marker by gid."""
    lines: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        whole = point.arm["kind"] in _WHOLE_OR_SHORTENED
        name, windows = "dense" if whole else point.arm["name"], point.owner.results["windows"]
        lines.setdefault((name, windows), []).append(point)
    hints, places = {}, []
    for index, members in enumerate(lines.values()):
        members.sort(key=lambda point: point.x)
        shift = _STEP ** (index - (len(lines) - 1) / 2)
        color = INK if members[0].arm["kind"] in _WHOLE_OR_SHORTENED else marks.of(members[0].arm)["color"]
        places += [point.x * shift for point in members]
        axes.plot([p.x * shift for p in members], [p.y for p in members], color=color, linewidth=1.4, zorder=1.5)
        for place, point in enumerate(members):
            gid = f"{face}-{index}-{place}"
            look = marks.of(point.arm)
            if point.interval:
                axes.plot([point.x * shift] * 2, point.interval, color=look["color"], alpha=0.65, linewidth=1.4)
            (line,) = axes.plot([point.x * shift], [point.y], linestyle="none", gid=gid, **look)
            line.set_url(point.url)
            hints[gid] = f"{point.arm['name']}, context of {point.x}: {number(point.y)} nats/token"
    if places:
        log_axis(axes, places)
    return hints


def _row(point: Point) -> list[Any]:
    arm = point.arm
    plain, far = (arm[f"{face}_interval"] or (None, None) for face in ("quality", "quality_far"))
    return [point.owner.name, arm["name"], point.x, arm["flops"], arm["quality"], *plain, arm["quality_far"], *far]


def _caption(comparisons: Sequence[Comparison], points: Sequence[Point], shown: set[tuple[int, str]]) -> str:
    several = len({(one.results["n_context"], one.results["windows"]) for one in comparisons}) > 1
    windows = (
        "Sweeps at different context lengths, or of different numbers of windows, score different text, so arms are "
        "compared within a sweep, trends across them."
        if several
        else "The windows and the scored suffix tokens are the same for every arm; only how much of the context before "
        "them the model was given differs."
    )
    return (
        f"NLL in nats/token against the context tokens that enter the first layer. {windows} Lines join the dense "
        "model, whole and shortened, and arms of one name; arms of one length stand side by side for legibility. Bars "
        "are the interval of the paired difference from the first arm, around the arm's own value. Shown are "
        f"{sum(_is_shown(point, shown) for point in points)} of {len(points)} arms: the controls, the best arms and "
        "the best of each schedule; the CSV has all."
    )
