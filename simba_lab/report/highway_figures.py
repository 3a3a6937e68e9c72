"""Pictures of the measured highways: each says in its caption what is drawn, how it is defined and in which unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import COLOURS, INK, WIDTH, Drawn, Figure, as_csv, canvas, draw
from simba_lab.report.marks import curve_look
from simba_lab.report.wording import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure as Canvas

MOST_LABELLED = 16  # layers; more rows leave no room for numbers in the cells
PANELS = 3  # in one row
SHADES = 24  # of the heat maps
NAN = float("nan")

Highways = Mapping[str, Any]


def highway_figures(highways: Highways) -> list[Figure]:
    """All figures of ``measure_highways``' result, in reading order."""
    figures = [redundancy_figure(highways)]
    figures += [loss_figure(highways)] if highways["loss_rise"] else []
    return [*figures, flow_figure(highways), reach_figure(highways), path_figure(highways)]


def _over(highways: Highways) -> str:
    windows = highways["windows"]
    lengths = f"{highways['n_context']:,} context tokens"
    return f"Mean over {windows} windows of {lengths}." if windows > 1 else f"One window of {lengths}."


def _by_layer(ylabel: str) -> tuple[Canvas, Axes]:
    """A figure with one pair of axes whose x is the layer."""
    from matplotlib.ticker import MaxNLocator

    figure = canvas(WIDTH, 3.4)
    axes = figure.subplots()
    axes.set(xlabel="layer (0 is nearest the input)", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _legend(figure: Canvas, title: str = "") -> Drawn:
    figure.legend(loc="outside right upper", title=title or None)
    return figure, {}


def _csv_by_layer(columns: Sequence[str], named: Iterable[tuple[str, Sequence[Sequence[Any]]]]) -> str:
    """A line for each layer of each name, with one cell from each of its lists."""
    rows = [[name, layer, *cells] for name, lists in named for layer, cells in enumerate(zip(*lists, strict=True))]
    return as_csv([columns[0], "layer", *columns[1:]], rows)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [NAN if value is None else value for value in values]


def redundancy_figure(highways: Highways) -> Figure:
    """Cosine of neighbours and of any two tokens, by layer and arm."""
    key, title, arms = "redundancy", "Redundancy by layer", highways["arms"]

    def build() -> Drawn:
        figure, axes = _by_layer("mean cosine similarity (no unit)")
        for index, arm in enumerate(arms):
            look = curve_look(index)
            name = shortened(arm["name"])
            axes.plot(_numbers(arm["neighbour_similarity"]), label=name, **look)
            faint = look | {"linestyle": ":", "linewidth": 1, "markersize": 3, "fillstyle": "none"}
            axes.plot(_numbers(arm["any_pair_similarity"]), label="any two tokens" if index == 0 else None, **faint)
        return _legend(figure)

    caption = (
        "Mean cosine similarity (no unit, -1 to 1) of the residual-stream vectors, at the input of each layer, of "
        "context tokens next to each other among those that enter it. Dotted, the marker open: the mean over all "
        "pairs of these tokens, which neighbours must exceed to be alike because they are neighbours. "
        + _over(highways)
    )
    measures = ("neighbour_similarity", "any_pair_similarity")
    table = _csv_by_layer(["arm", *measures], [(arm["name"], [arm[key] for key in measures]) for arm in arms])
    return Figure(key, title, caption, draw(key, title, build), table)


def loss_figure(highways: Highways) -> Figure:
    """What the suffix loses when one layer alone sees few tokens, by layer and criterion."""
    key, title, curves = "loss-rise", "Loss rise when a single layer is pruned", highways["loss_rise"]

    def build() -> Drawn:
        figure, axes = _by_layer("rise of suffix NLL (nats/token)")
        axes.axhline(0, color=INK, linewidth=0.8)
        for index, curve in enumerate(curves):
            errors = [error or 0 for error in curve["error"]]
            look = {**curve_look(index), "elinewidth": 1, "capsize": 2}
            axes.errorbar(range(len(errors)), _numbers(curve["rise"]), errors, label=_short(curve["criterion"]), **look)
        return _legend(figure, "criterion")

    error = " Bars: one standard error over the windows." if highways["windows"] > 1 else ""
    caption = (
        f"Rise, against the dense model, of the mean NLL (nats/token) of the {highways['n_suffix']:,} suffix tokens of "
        f"a window when one layer alone sees {highways['keep']:.0%} of the context. The criterion chooses them after "
        "the layer below, the boundary always among them; that layer adds nothing to the residual stream of the "
        f"others, and every other layer sees every token. Layer 0 is never pruned. {_over(highways)}{error}"
    )
    named = [(curve["criterion"], [curve["rise"], curve["error"]]) for curve in curves]
    table = _csv_by_layer(["criterion", "rise_nats_per_token", "standard_error"], named)
    return Figure(key, title, caption, draw(key, title, build), table)


def _short(criterion: str) -> str:
    return shortened(criterion.rpartition(".")[2] if "." in criterion else criterion, 24)


def _bins(highways: Highways) -> list[str]:
    """Name of each distance bin, as in ``simba_lab.inspection.flow.distance_bins``."""
    spans = [(1 << power, (2 << power) - 1) for power in range(len(highways["arms"][0]["share"][0]) - 1)]
    return ["0"] + [f"{low}" if low == high else f"{low}\N{EN DASH}{high}" for low, high in spans]


def flow_figure(highways: Highways) -> Figure:
    """Share of the boundary's output by layer and distance, a panel for each arm."""
    key, title, arms, names = "flow", "Where the boundary's output comes from", highways["arms"], _bins(highways)
    layers = len(arms[0]["share"])

    def build() -> Drawn:
        down, across = -(-len(arms) // PANELS), min(PANELS, len(arms))
        figure = canvas(WIDTH, down * (1.4 + min(layers, 2 * MOST_LABELLED) * 0.26))
        panels = list(figure.subplots(down, across, squeeze=False).flat)
        most = 100 * max(share for arm in arms for row in arm["share"] for share in row)
        for panel, arm in zip(panels, arms, strict=False):
            shades = _heat(panel, arm, names, most)
        for panel in panels[len(arms) :]:
            panel.set_axis_off()
        bar = figure.colorbar(shades, ax=panels, label="share (%)", fraction=0.03, aspect=30)
        bar.outline.set_visible(False)
        return figure, {}

    caption = (
        "Share (%; each row sums to 100) of what the tokens of a layer add through its recurrence to the boundary's "
        "output, by their distance from the boundary in tokens of the original text: token t adds dy(t), one number "
        "per channel, and its part is the sum over channels of |dy(t)|, before gate and skip connection. The highest "
        "share has the full colour, the same in all panels. " + _over(highways)
    )
    named = [(arm["name"], list(zip(*arm["share"], strict=True))) for arm in arms]
    table = _csv_by_layer(["arm", *(f"distance_{name}" for name in names)], named)
    return Figure(key, title, caption, draw(key, title, build), table)


def _heat(axes: Axes, arm: Mapping[str, Any], names: Sequence[str], most: float) -> QuadMesh:
    """One arm: layers upwards, distances to the right, the same colour thinner for less, full at ``most`` percent."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    colour = to_rgb(COLOURS[0])
    shades = LinearSegmentedColormap.from_list("share", [(*colour, 0.0), (*colour, 0.75)], N=SHADES)
    shares = [[100 * share for share in row] for row in arm["share"]]
    mesh = axes.pcolormesh(shares, cmap=shades, vmin=0, vmax=most or 1, edgecolors="none")
    axes.grid(False)
    if len(arm["share"]) <= MOST_LABELLED:
        for layer, row in enumerate(arm["share"]):
            for place, share in enumerate(row):
                if share >= 0.005:
                    axes.text(place + 0.5, layer + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5)
    axes.set_title(shortened(arm["name"], 32), fontsize=9)
    axes.set_xticks([place + 0.5 for place in range(len(names))], names, rotation=60, fontsize=7)
    axes.set_xlabel("distance (tokens)")
    step = -(-len(arm["share"]) // MOST_LABELLED)
    layers = range(0, len(arm["share"]), step)
    axes.set_yticks([layer + 0.5 for layer in layers], [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    return mesh


def reach_figure(highways: Highways) -> Figure:
    """How far back each layer reaches, by arm."""
    key, title, arms = "reach", "How far back a layer reaches", highways["arms"]

    def build() -> Drawn:
        figure, axes = _by_layer("reach (tokens)")
        for index, arm in enumerate(arms):
            axes.plot(arm["reach"], label=shortened(arm["name"]), **curve_look(index))
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 2 * highways["n_context"])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        return _legend(figure)

    caption = (
        "Distance (tokens of the original text, logarithmic above 1) at which the contribution to the boundary's "
        "output has fallen to 1\N{NO-BREAK SPACE}%: the least distance such that all tokens farther away together add "
        "less than 1\N{NO-BREAK SPACE}% of the sum over tokens and channels of |dy(t)|. " + _over(highways)
    )
    table = _csv_by_layer(["arm", "reach_tokens"], [(arm["name"], [arm["reach"]]) for arm in arms])
    return Figure(key, title, caption, draw(key, title, build), table)


def path_figure(highways: Highways) -> Figure:
    """Length of the shortest path from the first token to the boundary, by arm."""
    key, title, arms = "path", "Path from the first token to the last", highways["arms"]

    def build() -> Drawn:
        figure = canvas(WIDTH, 1.2 + 0.42 * len(arms))
        _path_bars(figure, arms)
        return figure, {}

    caption = (
        "Effective path length in scan steps: the fewest steps of the recurrence, summed over layers, by which "
        "information gets from the first token at layer 0 to the boundary at the last layer. Within a layer one step "
        "leads to the next token present; it goes up for free, at a token that enters the layer above. A dense model "
        f"needs {highways['n_context'] - 1:,}: it must cross every token somewhere. {_over(highways)}"
    )
    table = _csv_by_layer(["arm", "scan_steps"], [(arm["name"], [arm["scan_steps"]]) for arm in arms])
    return Figure(key, title, caption, draw(key, title, build), table)


def _path_bars(figure: Canvas, arms: Sequence[Mapping[str, Any]]) -> None:
    """Steps in the last layer and below it, the sum beside the bar."""
    axes = figure.subplots()
    last = [arm["scan_steps"][-1] for arm in arms]
    below = [sum(arm["scan_steps"][:-1]) for arm in arms]
    rows = range(len(arms))
    axes.barh(rows, last, color=COLOURS[0], height=0.6, label="in the last layer")
    axes.barh(rows, below, left=last, color=COLOURS[4], height=0.6, label="in the layers below")
    for row, (steps, more) in enumerate(zip(last, below, strict=True)):
        beside = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(f"{steps + more:,.0f}", (steps + more, row), va="center", **beside)
    axes.set_yticks(rows, [shortened(arm["name"]) for arm in arms])
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("scan steps")
    figure.legend(loc="outside right upper")
