"""Quality against what it costs: every arm against FLOPs and against seconds, with dense models as a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import INK, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.folders import Comparison
from simba_lab.report.marks import Marks
from simba_lab.report.results import Arm, Results
from simba_lab.report.thinning import drawn, told
from simba_lab.report.wording import number, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FACES = {"quality": "suffix NLL (nats/token)", "quality_far": "far-token NLL (nats/token)"}
_DIFFERENCES = {"quality": "difference", "quality_far": "difference_far"}
_LADDER = ("smaller_dense", "dense")


@dataclass(frozen=True)
class Point:
    """An arm in a figure: where it stands, and the configuration that its marker links to."""

    arm: Arm
    x: float
    y: float
    interval: tuple[float, float] | None
    url: str
    owner: Comparison

    @property
    def matched(self) -> bool:
        return self.arm["matched"]


def points_of(comparisons: Sequence[Comparison], face: str, where: Callable[[Arm], float | None]) -> list[Point]:
    """Every arm with a quality and a positive place; the interval is that of its paired difference, around its own."""
    made = []
    for owner in comparisons:
        for arm in owner.results["arms"]:
            if arm[face] is None or not (x := where(arm)):
                continue
            difference, around = arm[_DIFFERENCES[face]], arm[f"{_DIFFERENCES[face]}_interval"]
            interval = None
            if difference is not None and around is not None:
                interval = (arm[face] + around[0] - difference, arm[face] + around[1] - difference)
            made.append(Point(arm, x, arm[face], interval, f"#{owner.anchor(arm)}", owner))
    return made


def flops_figure(comparisons: Sequence[Comparison], face: str, key: str = "") -> Figure | None:
    """Quality against FLOPs: every arm, and beside it the arms inside the budget's tolerance."""
    points = points_of(comparisons, face, itemgetter("flops"))
    if not points:
        return None
    results = comparisons[0].results
    far = face == "quality_far"
    key = key or ("far-flops" if far else "flops")
    title = "Far-token NLL against FLOPs" if far else "Suffix NLL against FLOPs"

    def build() -> Drawn:
        shown = drawn_of(points)
        marks = marks_of(comparisons, shown)
        figure = canvas(WIDTH, marks.height(4.4, joined=True))
        everything, inside = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        hints = _all_arms(everything, comparisons, shown, marks)
        everything.set_ylabel(f"{_FACES[face]}, lower is better")
        hints |= _inside(inside, results, [p for p in shown if _at_budget(p, results)], marks)
        marks.legend(figure, joined=True)
        return figure, hints

    columns = ["sweep", "arm", "kind", "criterion", "schedule", "matched", "flops", face, "low", "high"]
    columns += ["paired_low", "paired_high"]
    rows = [_row(point, face) for point in points]
    caption = _flops_caption(comparisons, far) + told(comparisons)
    return Figure(key, title, caption, draw(key, title, build), as_csv(columns, rows))


def drawn_of(points: Sequence[Point]) -> list[Point]:
    """The points of the arms that a picture shows."""
    owners = {id(point.owner): point.owner for point in points}
    names = {key: {arm["name"] for arm in drawn(owner)} for key, owner in owners.items()}
    return [point for point in points if point.arm["name"] in names[id(point.owner)]]


def marks_of(comparisons: Sequence[Comparison], shown: Sequence[Point]) -> Marks:
    """The looks of all arms, with a legend of those shown."""
    return Marks([arm for one in comparisons for arm in one.results["arms"]], [point.arm for point in shown])


def _at_budget(point: Point, results: Results) -> bool:
    return point.matched and abs(point.x / results["budget_flops"] - 1) <= results["tolerance"]


def _row(point: Point, face: str) -> list[Any]:
    arm = point.arm
    plain = [arm[k] for k in ("name", "kind", "criterion", "schedule", "matched", "flops", face)]
    return [point.owner.name, *plain, *(arm[f"{face}_interval"] or (None, None)), *(point.interval or (None, None))]


def _all_arms(axes: Axes, comparisons: Sequence[Comparison], points: Sequence[Point], marks: Marks) -> dict[str, str]:
    budgets = {one.results["budget_flops"]: one.results["tolerance"] for one in comparisons}
    for budget, tolerance in budgets.items():
        axes.axvspan(*(budget / 1e9 * (1 + s * tolerance) for s in (-1, 1)), color=INK, alpha=0.12, lw=0)
    giga = [point.x / 1e9 for point in points]
    _dense_lines(axes, points, giga)
    _pairs(axes, points, giga)
    hints = _markers(axes, points, giga, marks, "all")
    log_axis(axes, giga)
    axes.set(title="all arms", xlabel="GFLOPs per window (log)")
    _name_controls(axes, points, giga)
    return hints


def _inside(axes: Axes, results: Results, points: Sequence[Point], marks: Marks) -> dict[str, str]:
    x = [100 * (point.x / results["budget_flops"] - 1) for point in points]
    _pairs(axes, points, x)
    hints = _markers(axes, points, x, marks, "in")
    edge = 1.3 * max((abs(where) for where in x), default=0.0) or 0.01
    axes.set(title="arms within the budget, enlarged", xlabel="FLOPs above the budget (%)", xlim=(-edge, edge))
    return hints


def _dense_lines(axes: Axes, points: Sequence[Point], x: Sequence[float]) -> None:
    """The dense models that were given the same windows as a line from the smallest to the largest."""
    ladders: dict[tuple[int, ...], list[tuple[float, float]]] = {}
    for point, where in zip(points, x, strict=True):
        if point.arm["kind"] in _LADDER:
            sizes = tuple(point.owner.results[key] for key in ("n_context", "n_suffix", "windows"))
            ladders.setdefault(sizes, []).append((where, point.y))
    for ladder in ladders.values():
        axes.plot(*zip(*sorted(set(ladder)), strict=True), color=INK, linewidth=1.4, marker="", zorder=1.5)


def _pairs(axes: Axes, points: Sequence[Point], x: Sequence[float]) -> None:
    """Joins, in each sweep, the dense arm at the budget with the best pruned arm at the same budget."""
    groups: dict[int, list[tuple[Point, float]]] = {}
    for point, where in zip(points, x, strict=True):
        if point.matched:
            groups.setdefault(id(point.owner), []).append((point, where))
    for group in groups.values():
        dense = [one for one in group if one[0].arm["kind"] == "smaller_dense"]
        pruned = sorted((one for one in group if one[0].arm["kind"] == "pruned"), key=lambda one: one[0].y)
        if dense and pruned:
            ends = (dense[0], pruned[0])
            axes.plot([e[1] for e in ends], [e[0].y for e in ends], color=INK, linestyle=":", linewidth=1.6, zorder=1.6)


def _markers(axes: Axes, points: Sequence[Point], x: Sequence[float], marks: Marks, prefix: str) -> dict[str, str]:
    """Draw the arms with their intervals; returns the hint of each marker by gid."""
    hints = {}
    for index, (point, where) in enumerate(zip(points, x, strict=True)):
        look, gid = marks.of(point.arm), f"{prefix}-{index}"
        if point.interval:
            axes.plot([where, where], point.interval, color=look["color"], alpha=0.65, linewidth=1.2)
        (line,) = axes.plot([where], [point.y], linestyle="none", gid=gid, **look)
        line.set_url(point.url)
        hints[gid] = f"{point.arm['name']}: {number(point.y)} nats/token, {point.arm['flops'] / 1e9:.4g} GFLOPs"
    return hints


def _name_controls(axes: Axes, points: Sequence[Point], x: Sequence[float]) -> None:
    """Names beside the dense models, so that the line needs no legend."""
    middle = sum(axes.get_xlim()) / 2
    for name in dict.fromkeys(point.arm["name"] for point in points if point.arm["kind"] in _LADDER):
        point, where = next((p, w) for p, w in zip(points, x, strict=True) if p.arm["name"] == name)
        left = where > middle
        axes.annotate(
            shortened(name, 22), (where, point.y), xytext=(-6, -13) if left else (9, 5), textcoords="offset points",
            ha="right" if left else "left", fontsize=8,
        )  # fmt: skip


def _flops_caption(comparisons: Sequence[Comparison], far: bool) -> str:
    results = comparisons[0].results
    scored = _far_text(comparisons) if far else "Mean negative log-likelihood of the suffix tokens in nats/token."
    return (
        f"{scored} Left: every arm against its GFLOPs per window, the budget with its tolerance shaded; the solid line "
        "joins the dense models, the dotted line the dense model at the budget and the best pruned arm at equal "
        f"FLOPs. Right: the arms inside the tolerance of {100 * results['tolerance']:g} %. Bars are the interval of "
        "the paired difference from the first arm, drawn around the arm's own value; the intervals of the values "
        "themselves are far wider, since windows differ more than arms, and stand in the table and the CSV."
    )


def _far_text(comparisons: Sequence[Comparison]) -> str:
    every = {(one.results["far_tokens"], one.results.get("far_distance")) for one in comparisons}
    tokens, distance = every.pop()
    count, beyond = f"{tokens:,} far tokens", "beyond the reach of the shorter context"
    if every:
        count = "far tokens of each sweep"
    elif distance:
        beyond = f"more than {distance:g} positions before the end of the context"
    return f"NLL in nats/token of the {count}: those that last occurred {beyond}."


def log_axis(axes: Axes, x: Sequence[float]) -> None:
    """A log axis with plain numbers, also where the arms span less than a decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    if max(x) < 8 * min(x):
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_minor_locator(NullLocator())
    room = (max(x) / min(x)) ** 0.08 if max(x) > min(x) else 1.1
    axes.set_xlim(min(x) / room, max(x) * room)


def _windows(comparisons: Sequence[Comparison]) -> str:
    counts = [f"{count:,}" for count in sorted({one.results["windows"] for one in comparisons})]
    return f"{' or '.join(counts)} windows"


def seconds_figure(comparisons: Sequence[Comparison]) -> Figure | None:
    """Quality against wall-clock seconds."""
    points = points_of(comparisons, "quality", itemgetter("wall_seconds"))
    if not points:
        return None
    key, title, windows = "seconds", "Suffix NLL against seconds", _windows(comparisons)

    def build() -> Drawn:
        shown = drawn_of(points)
        marks = marks_of(comparisons, shown)
        figure = canvas(WIDTH, marks.height(3.9, joined=True))
        axes, seconds = figure.subplots(), [point.x for point in shown]
        _dense_lines(axes, shown, seconds)
        _pairs(axes, shown, seconds)
        hints = _markers(axes, shown, seconds, marks, "s")
        log_axis(axes, seconds)
        axes.set(xlabel=f"seconds for {windows} (log)", ylabel=f"{_FACES['quality']}, lower is better")
        _name_controls(axes, shown, seconds)
        marks.legend(figure, joined=True)
        return figure, hints

    caption = (
        f"Suffix NLL in nats/token against the wall-clock seconds that each arm took for {windows} on the "
        "machine named below, taken once; lines and bars as above. Seconds depend on the machine and its load; the "
        f"comparison is made at equal FLOPs.{told(comparisons)}"
    )
    rows = [[p.owner.name, p.arm["name"], p.arm["wall_seconds"], p.y, *(p.interval or (None, None))] for p in points]
    columns = ["sweep", "arm", "wall_seconds", "quality", "paired_low", "paired_high"]
    return Figure(key, title, caption, draw(key, title, build), as_csv(columns, rows))
