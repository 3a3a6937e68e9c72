"""Which shape, colour, filling and dash stands for what; no two arms differ by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import COLOURS, INK, tall_enough
from simba_lab.report.results import Arm
from simba_lab.report.wording import KINDS, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
FILLS = ("full", "none", "left", "top", "right", "bottom")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
JOINS = {"dense models": "-", "pair at equal FLOPs": ":"}
CONTROLS = {"dense": "*", "smaller_dense": "d", "shorter_context": "p"}


class Marks:
    """How an arm is drawn: shape and colour by criterion, filling by schedule, a black shape for each control.

    Args:
        arms: all of the comparison in the file's order, so that an arm looks the same in every figure.
        shown: those that the figure draws and its legend names; None: all.
    """

    def __init__(self, arms: Sequence[Arm], shown: Sequence[Arm] | None = None) -> None:
        self.criteria, self.schedules = _names(arms, "criterion"), _names(arms, "schedule")
        shown = arms if shown is None else shown
        self.shown = {*_names(shown, "criterion")}, {*_names(shown, "schedule")}
        self.kinds = [kind for kind in CONTROLS if any(arm["kind"] == kind for arm in shown)]

    def of(self, arm: Arm) -> dict[str, Any]:
        """Line2D properties of the arm's marker."""
        if arm["kind"] in CONTROLS:
            return self.control(arm["kind"])
        criterion = self.criteria.index(_name(arm, "criterion"))
        schedule = self.schedules.index(_name(arm, "schedule"))
        return self.shape(criterion) | {"fillstyle": FILLS[schedule % len(FILLS)]}

    def shape(self, criterion: int) -> dict[str, Any]:
        return {"marker": MARKERS[criterion % len(MARKERS)], "color": COLOURS[criterion % len(COLOURS)]}

    def control(self, kind: str) -> dict[str, Any]:
        return {"marker": CONTROLS[kind], "color": INK, "markersize": 11 if kind == "dense" else 8}

    def height(self, least: float, joined: bool = False) -> float:
        """Inches that a figure of at least `least` needs for the legend."""
        groups = [len(group) for group in (*self.shown, self.kinds, JOINS if joined else ())]
        return tall_enough(least, sum(groups) + sum(map(bool, groups)))

    def legend(self, figure: Canvas, joined: bool = False) -> None:
        """One entry per criterion, schedule, control and (if `joined`) line, outside the axes on the right."""
        from matplotlib.lines import Line2D

        def entry(label: str, **look: Any) -> Line2D:
            return Line2D([], [], linestyle="none", label=label, **look)

        criteria, schedules = self.shown
        entries = [entry("criterion: shape", marker="")] if criteria else []
        entries += [entry(name, **self.shape(i)) for i, name in enumerate(self.criteria) if name in criteria]
        entries += [entry("schedule: filling", marker="")] if schedules else []
        entries += [
            entry(name, marker="o", color=INK, fillstyle=FILLS[i % len(FILLS)], markersize=6)
            for i, name in enumerate(self.schedules)
            if name in schedules
        ]
        entries += [entry("controls", marker="")] if self.kinds else []
        entries += [entry(KINDS[kind], **self.control(kind)) for kind in self.kinds]
        if joined:
            entries.append(entry("lines", marker=""))
            entries += [Line2D([], [], color=INK, linestyle=dash, label=name) for name, dash in JOINS.items()]
        legend = figure.legend(handles=entries, loc="outside right upper")
        for text, handle in zip(legend.get_texts(), entries, strict=True):
            text.set_weight("bold" if handle.get_marker() == "" else "normal")


def _names(arms: Sequence[Arm], key: str) -> list[str]:
    return list(dict.fromkeys(_name(arm, key) for arm in arms if arm["kind"] not in CONTROLS))


def _name(arm: Arm, key: str) -> str:
    return shortened(arm[key] or "none", 24)


def curve_looks(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Looks of several curves by their arms' kinds; only curves that are no control use up a colour."""
    coloured = 0
    looks = []
    for index, kind in enumerate(kinds):
        looks.append(curve_look(index if kind in CONTROLS else coloured, kind))
        coloured += kind not in CONTROLS
    return looks


def dash(index: int) -> Any:
    """Of the index-th curve."""
    return DASHES[index % len(DASHES)]


def curve_look(index: int, kind: str = "pruned") -> dict[str, Any]:
    """Colour, dash and marker of the index-th curve; a control keeps its black shape, `kind` says which."""
    look = {"linestyle": dash(index), "markersize": 5}
    if kind in CONTROLS:
        return look | {"color": INK, "marker": CONTROLS[kind]}
    return look | {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
