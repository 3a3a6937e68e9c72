"""The figures of the report, each a function from results to a `Figure` (SVG, caption, CSV), or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simba_lab.report.curve_figures import distance_figure, keep_figure, search_figure
from simba_lab.report.drawing import INK, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.marks import Marks
from simba_lab.report.results import Arm, Results, by_quality, differs_from_first
from simba_lab.report.wording import kind_of, number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A run of ordinary spaces collapses to one in SVG text.
BLANK = "\u00a0"

_FACES = {"quality": "suffix NLL (nats/token)", "quality_far": "far-token NLL (nats/token)"}


def all_figures(results: Results) -> list[Figure]:
    """Every figure that these results have the data for, in reading order."""
    made = [
        flops_figure(results, "quality"),
        flops_figure(results, "quality_far"),
        forest_figure(results),
        keep_figure(results),
        distance_figure(results),
        search_figure(results),
        seconds_figure(results),
    ]
    return [figure for figure in made if figure is not None]


def flops_figure(results: Results, face: str) -> Figure | None:
    """Quality against FLOPs: every arm, and beside it the arms inside the budget's tolerance."""
    arms = [arm for arm in results["arms"] if arm[face] is not None]
    if not arms:
        return None
    far = face == "quality_far"
    budget, key = results["budget_flops"], "far-flops" if far else "flops"
    title = "Far tokens against FLOPs" if far else "Quality against FLOPs"

    def build() -> Drawn:
        figure = canvas(WIDTH, 4.2)
        marks, hints = Marks(results["arms"]), {}
        everything, inside = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        everything.axvspan(
            *(budget / 1e9 * (1 + s * results["tolerance"]) for s in (-1, 1)), color=INK, alpha=0.12, lw=0
        )
        hints |= _points(everything, arms, [arm["flops"] / 1e9 for arm in arms], face, marks, "all")
        _flops_axis(everything, [arm["flops"] / 1e9 for arm in arms])
        everything.set(title="all arms", xlabel="GFLOPs per window", ylabel=_FACES[face])
        matched = [arm for arm in arms if arm["matched"]]
        hints |= _points(inside, matched, [100 * (arm["flops"] / budget - 1) for arm in matched], face, marks, "in")
        edge = 120 * results["tolerance"] or 0.01
        inside.set(title="arms within the budget", xlabel="FLOPs above the budget (%)", xlim=(-edge, edge))
        marks.legend(figure)
        return figure, hints

    columns = ["arm", "kind", "criterion", "schedule", "matched", "flops", face, "low", "high"]
    plain = ("name", "kind", "criterion", "schedule", "matched", "flops", face)
    rows = [[*(arm[k] for k in plain), *(arm[f"{face}_interval"] or (None, None))] for arm in arms]
    return Figure(key, title, _flops_caption(results, far), draw(key, title, build), as_csv(columns, rows))


def _flops_caption(results: Results, far: bool) -> str:
    scored = _far_text(results) if far else "Mean negative log-likelihood of the suffix tokens in nats/token."
    return (
        f"{scored} Lower is better. Bars are the interval of each arm's own mean over the windows: they overlap even "
        "where the paired difference between two arms is clear, which only the forest plot shows. Left: every arm "
        f"against its GFLOPs per window, the budget with its tolerance shaded. Right: the arms inside the tolerance of "
        f"{100 * results['tolerance']:g} %."
    )


def _far_text(results: Results) -> str:
    distance = results.get("far_distance")
    beyond = (
        f"more than {distance:g} positions before the boundary" if distance else "beyond the shorter context's reach"
    )
    return f"NLL in nats/token of the {results['far_tokens']} far tokens: those that last occurred {beyond}."


def _points(
    axes: Axes, arms: Sequence[Arm], x: Sequence[float], face: str, marks: Marks, prefix: str
) -> dict[str, str]:
    """Draw the arms with their intervals; returns the hint of each marker by gid."""
    hints = {}
    for index, (arm, where) in enumerate(zip(arms, x, strict=True)):
        look, gid = marks.of(arm), f"{prefix}-{index}"
        if arm[f"{face}_interval"]:
            axes.plot([where, where], arm[f"{face}_interval"], color=look["color"], alpha=0.45, linewidth=1.2)
        axes.plot([where], [arm[face]], linestyle="none", gid=gid, **look)
        hints[gid] = f"{arm['name']}: {number(arm[face])} nats/token, {arm['flops'] / 1e9:.4g} GFLOPs per window"
    return hints


def _flops_axis(axes: Axes, x: Sequence[float]) -> None:
    """A log axis where the arms span more than a factor of four."""
    if max(x) > 4 * min(x):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")


def seconds_figure(results: Results) -> Figure | None:
    """Quality against wall-clock seconds."""
    arms = [arm for arm in results["arms"] if arm["quality"] is not None and arm["wall_seconds"]]
    if not arms:
        return None
    key, title = "seconds", "Quality against wall-clock"

    def build() -> Drawn:
        figure = canvas(WIDTH, 3.8)
        axes, marks = figure.subplots(), Marks(results["arms"])
        seconds = [arm["wall_seconds"] for arm in arms]
        hints = _points(axes, arms, seconds, "quality", marks, "s")
        _flops_axis(axes, seconds)
        axes.set(xlabel=f"seconds for {results['windows']} windows", ylabel=_FACES["quality"])
        marks.legend(figure)
        return figure, hints

    caption = (
        f"Suffix NLL in nats/token against the wall-clock seconds that each arm took for its {results['windows']} "
        "windows on the machine named below. Seconds depend on it and its load; the comparison is made at equal FLOPs."
    )
    rows = [[arm["name"], arm["wall_seconds"], arm["quality"]] for arm in arms]
    return Figure(key, title, caption, draw(key, title, build), as_csv(["arm", "wall_seconds", "quality"], rows))


def forest_figure(results: Results) -> Figure | None:
    """Paired differences from the first arm, plain and far, one row per arm."""
    first, *others = results["arms"]
    rows = [arm for arm in by_quality({"arms": others}) if arm["difference"] is not None]
    if not rows:
        return None
    key, title = "forest", f"Paired differences from {shortened(first['name'])}"

    def build() -> Drawn:
        figure = canvas(WIDTH, 1.1 + 0.24 * len(rows))
        marks, hints = Marks(results["arms"]), {}
        plain, far = figure.subplots(1, 2, sharey=True)
        for axes, is_far, name in ((plain, False, "all suffix tokens"), (far, True, "far tokens")):
            hints |= _forest(axes, rows, is_far, marks)
            axes.set(title=name, xlabel=f"arm \u2212 first arm (nats/token)\n\u2190 better {8 * BLANK} worse \u2192")
        plain.set_yticks(range(len(rows)), [shortened(arm["name"]) for arm in rows])
        plain.set_ylim(len(rows) - 0.4, -0.6)
        return figure, hints

    return Figure(key, title, _forest_caption(first), draw(key, title, build), _forest_csv(rows))


def _forest(axes: Axes, arms: Sequence[Arm], far: bool, marks: Marks) -> dict[str, str]:
    key, hints = "difference_far" if far else "difference", {}
    axes.axvline(0, color=INK, linewidth=1)
    for row, arm in enumerate(arms):
        if arm[key] is None:
            continue
        look = marks.of(arm) | {"fillstyle": "full" if differs_from_first(arm, far) else "none"}
        gid = f"{key}-{row}"
        if arm[f"{key}_interval"]:
            axes.plot(arm[f"{key}_interval"], [row, row], color=look["color"], linewidth=1.8)
        axes.plot([arm[key]], [row], linestyle="none", gid=gid, **look)
        hints[gid] = f"{arm['name']} ({kind_of(arm)}): {number(arm[key], sign=True)} nats/token"
    return hints


def _forest_caption(first: Arm) -> str:
    return (
        f"Each arm's NLL minus that of the first arm, {shortened(first['name'])} ({kind_of(first)}), window by window "
        "over the same windows, in nats/token; left of the line the arm predicts better. Bars are the paired bootstrap "
        "interval. A filled marker is a difference that may be claimed (Holm-corrected permutation p < 0.05 and an "
        "interval without zero), an open marker one that may not. Rows are ordered by plain NLL."
    )


def _forest_csv(arms: Sequence[Arm]) -> str:
    columns, rows = ["arm"], [[arm["name"]] for arm in arms]
    for far in ("", "_far"):
        columns += [f"difference{far}", f"low{far}", f"high{far}", f"p_value{far}"]
        for row, arm in zip(rows, arms, strict=True):
            interval = arm[f"difference{far}_interval"] or (None, None)
            row += [arm[f"difference{far}"], *interval, arm[f"p_value{far}"]]
    return as_csv(columns, rows)
