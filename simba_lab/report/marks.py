"""Which shape, colour, filling and dash stands for what; no two arms differ by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import INK, tall_enough
from simba_lab.report.results import Arm
from simba_lab.report.wording import KINDS, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito's colours without the yellow, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
FILLS = ("full", "none", "left", "top", "right", "bottom")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
JOINS = {"dense models": "-", "pair at equal FLOPs": ":"}
CONTROLS = {"dense": "*", "smaller_dense": "d", "shorter_context": "p"}


class Marks:
    """How an arm is drawn: shape and colour by criterion, filling by schedule, a black shape for each control."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        pruned = [arm for arm in arms if arm["kind"] not in CONTROLS]
        self.criteria = list(dict.fromkeys(shortened(arm["criterion"] or "none", 24) for arm in pruned))
        self.schedules = list(dict.fromkeys(shortened(arm["schedule"] or "none", 24) for arm in pruned))
        self.kinds = [kind for kind in CONTROLS if any(arm["kind"] == kind for arm in arms)]

    def of(self, arm: Arm) -> dict[str, Any]:
        """Line2D properties of the arm's marker."""
        if arm["kind"] in CONTROLS:
            return self.control(arm["kind"])
        criterion = self.criteria.index(shortened(arm["criterion"] or "none", 24))
        schedule = self.schedules.index(shortened(arm["schedule"] or "none", 24))
        return self.shape(criterion) | {"fillstyle": FILLS[schedule % len(FILLS)]}

    def shape(self, criterion: int) -> dict[str, Any]:
        return {"marker": MARKERS[criterion % len(MARKERS)], "color": COLOURS[criterion % len(COLOURS)]}

    def control(self, kind: str) -> dict[str, Any]:
        return {"marker": CONTROLS[kind], "color": INK, "markersize": 11 if kind == "dense" else 8}

    def height(self, least: float, joined: bool = False) -> float:
        """Inches that a figure of at least `least` needs for the legend."""
        groups = [len(group) for group in (self.criteria, self.schedules, self.kinds, JOINS if joined else ())]
        return tall_enough(least, sum(groups) + sum(map(bool, groups)))

    def legend(self, figure: Canvas, joined: bool = False) -> None:
        """One entry per criterion, schedule, control and (if `joined`) line, outside the axes on the right."""
        from matplotlib.lines import Line2D

        def entry(label: str, **look: Any) -> Line2D:
            return Line2D([], [], linestyle="none", label=label, **look)

        entries = [entry("criterion: shape", marker="")] if self.criteria else []
        entries += [entry(name, **self.shape(i)) for i, name in enumerate(self.criteria)]
        entries += [entry("schedule: filling", marker="")] if self.schedules else []
        entries += [
            entry(name, marker="o", color=INK, fillstyle=FILLS[i % len(FILLS)], markersize=6)
            for i, name in enumerate(self.schedules)
        ]
        entries += [entry("controls", marker="")] if self.kinds else []
        entries += [entry(KINDS[kind], **self.control(kind)) for kind in self.kinds]
        if joined:
            entries.append(entry("lines", marker=""))
            entries += [Line2D([], [], color=INK, linestyle=dash, label=name) for name, dash in JOINS.items()]
        legend = figure.legend(handles=entries, loc="outside right upper")
        for text, handle in zip(legend.get_texts(), entries, strict=True):
            text.set_weight("bold" if handle.get_marker() == "" else "normal")


def curve_looks(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Looks of several curves by their arms' kinds; only curves that are no control use up a colour."""
    coloured = 0
    looks = []
    for index, kind in enumerate(kinds):
        looks.append(curve_look(index if kind in CONTROLS else coloured, kind))
        coloured += kind not in CONTROLS
    return looks


def curve_look(index: int, kind: str = "pruned") -> dict[str, Any]:
    """Colour, dash and marker of the index-th curve; a control keeps its black shape, `kind` says which."""
    look = {"linestyle": DASHES[index % len(DASHES)], "markersize": 5}
    if kind in CONTROLS:
        return look | {"color": INK, "marker": CONTROLS[kind]}
    return look | {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
