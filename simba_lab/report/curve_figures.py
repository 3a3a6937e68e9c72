"""Figures whose arms are curves: keep counts by layer, NLL by evidence distance, and the trials of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simba_lab.report.drawing import INK, WIDTH, Drawn, Figure, as_csv, canvas, draw, tall_enough
from simba_lab.report.folders import Comparison
from simba_lab.report.marks import CONTROLS, Marks, curve_look, curve_looks, dash
from simba_lab.report.results import Arm, Results
from simba_lab.report.thinning import drawn, told
from simba_lab.report.wording import KINDS, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SEARCHED = "searched"
MOST_TRIALS, MOST_CURVES = 200, 16


def keep_figure(comparison: Comparison) -> Figure | None:
    """Context tokens entering each layer; arms of one schedule share a look, and a line where they share the counts."""
    results = comparison.results
    arms = [arm for arm in results["arms"] if arm["keep_counts"]]
    if not arms:
        return None
    key, title = f"{comparison.prefix}keep", "Keep curves by layer"
    families: dict[str, list[Arm]] = {}
    for arm in (arm for arm in drawn(comparison) if arm["keep_counts"]):
        families.setdefault(_family(results, arm), []).append(arm)

    def build() -> Drawn:
        figure = canvas(WIDTH, tall_enough(3.9, 1 + len(families)))
        axes = figure.subplots()
        looks = curve_looks([members[0]["kind"] for members in families.values()])
        for (name, members), look in zip(families.items(), looks, strict=True):
            curves: dict[tuple[int, ...], str] = {}
            for arm in members:
                curves.setdefault(tuple(arm["keep_counts"]), f"#{comparison.anchor(arm)}")
            label = f"{name} ({len(members)} arms)" if len(members) > 1 else name
            if name == SEARCHED:
                look |= {"linestyle": "-", "linewidth": 3.2, "markersize": 8, "zorder": 3}
            for number, (curve, url) in enumerate(curves.items()):
                shown = {"label": label if number == 0 else None, "url": url}
                axes.plot(range(len(curve)), curve, **shown, **look)
        _layer_axis(axes, max(len(arm["keep_counts"]) for arm in arms), results["n_context"])
        figure.legend(loc="outside right upper", title="schedule")
        return figure, {}

    caption = (
        f"Context tokens entering each layer, of the {results['n_context']} before the boundary, for every arm. Suffix "
        "tokens are never pruned and not counted. Where criteria cost different FLOPs, the budget solver gives the "
        "same schedule slightly different counts, drawn as separate lines."
    )
    if SEARCHED in families:
        caption += " The thick line is the curve that the search found."
    caption += told([comparison])
    layers = max(len(arm["keep_counts"]) for arm in arms)
    rows = [[arm["name"], *arm["keep_counts"]] for arm in arms]
    table = as_csv(["arm", *(f"layer_{layer}" for layer in range(layers))], rows)
    return Figure(key, title, caption, draw(key, title, build), table)


def _family(results: Results, arm: Arm) -> str:
    if results.get("search") and arm["name"] == SEARCHED:
        return SEARCHED
    return shortened(arm["schedule"] or KINDS.get(arm["kind"], arm["kind"]), 28)


def _layer_axis(axes: Axes, layers: int, n_context: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="layer (0 is nearest the input)", ylabel="context tokens entering it", ylim=(0, 1.05 * n_context))
    axes.set_xlim(-0.2, layers - 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    share = axes.secondary_yaxis("right", functions=(lambda k: 100 * k / n_context, lambda s: s * n_context / 100))
    share.set_ylabel("share of the context (%)")


def distance_figure(comparison: Comparison) -> Figure | None:
    """NLL by evidence distance: absolute, and relative to the first arm."""
    results = comparison.results
    first = results["arms"][0]
    bins = [(row["low"], row["high"]) for row in first["by_distance"] or []]
    arms = [arm for arm in results["arms"] if _bins(arm) == bins]
    if not bins:
        return None
    key, title = f"{comparison.prefix}distance", "NLL by evidence distance"
    shown = telling(results, [arm for arm in drawn(comparison) if _bins(arm) == bins])

    def build() -> Drawn:
        figure = canvas(WIDTH, tall_enough(4.2, len(shown)))
        absolute, relative = figure.subplots(1, 2)
        marks = Marks(results["arms"])
        for index, arm in enumerate(shown):
            values = [row["nll"] for row in arm["by_distance"]]
            base = [row["nll"] for row in first["by_distance"]]
            gaps = [None if v is None or b is None else v - b for v, b in zip(values, base, strict=True)]
            look = marks.of(arm) | {"markersize": 5.5, "linestyle": dash(index), "url": f"#{comparison.anchor(arm)}"}
            _bin_line(absolute, values, {**look, "label": shortened(arm["name"], 28)})
            _bin_line(relative, gaps, look)
        labels = [f"{_bin_name(row)}\n{row['tokens']}" for row in first["by_distance"]]
        for axes in (absolute, relative):
            axes.set_xticks(range(len(bins)), labels, fontsize=6.8)
            axes.set_xlabel("positions back to the last occurrence; below: tokens")
        absolute.set(title="NLL", ylabel="nats/token")
        relative.set(title=f"minus {shortened(first['name'])}", ylabel="nats/token (below 0: better)")
        figure.legend(loc="outside right upper")
        return figure, {}

    caption = (
        "NLL in nats/token of the scored tokens, grouped by how many positions back the same token last occurred; "
        "under each group its number of tokens. Right: the same minus the first arm. Drawn without intervals, so small "
        f"gaps mean nothing by themselves: the paired test covers far tokens as a whole. Shown are {len(shown)} of "
        f"{len(arms)} arms: the controls, the best arms and the best of each schedule; the CSV has all."
    )
    return Figure(key, title, caption, draw(key, title, build), _distance_csv(arms))


def _bins(arm: Arm) -> list[tuple[Any, Any]]:
    return [(row["low"], row["high"]) for row in arm["by_distance"] or []]


def _bin_name(row: Mapping[str, Any]) -> str:
    """The distances of a group, whose ``high`` is not among them."""
    low, high = row["low"], row["high"]
    if low is None and high is None:
        return "never"
    if high is None:
        return f"\u2265 {low:g}"
    if low is None:
        return f"< {high:g}"
    return f"{low:g}" if high == low + 1 else f"{low:g}\u2013{high - 1:g}"


def _bin_line(axes: Axes, values: Sequence[float | None], look: Mapping[str, Any]) -> None:
    axes.plot(range(len(values)), [float("nan") if v is None else v for v in values], **look)


def telling(results: Results, arms: Sequence[Arm]) -> list[Arm]:
    """The controls, both best arms and the best far arm of each schedule, at most 16: what an eye can follow."""
    conclusion, chosen = results["conclusion"], set()
    best_of: dict[str, Arm] = {}
    for arm in arms:
        if arm["kind"] in CONTROLS or arm["name"] in (conclusion["best"], conclusion["best_far"]):
            chosen.add(arm["name"])
        elif arm["quality_far"] is not None:
            leader = best_of.setdefault(arm["schedule"], arm)
            best_of[arm["schedule"]] = min(leader, arm, key=lambda one: one["quality_far"])
    leaders = sorted(best_of.values(), key=lambda arm: arm["quality_far"])
    names = [*(arm["name"] for arm in arms if arm["name"] in chosen), *(arm["name"] for arm in leaders)]
    return [arm for arm in arms if arm["name"] in names[:MOST_CURVES]]


def _distance_csv(arms: Sequence[Arm]) -> str:
    rows = [
        [arm["name"], row["low"], row["high"], row["tokens"], row["nll"]] for arm in arms for row in arm["by_distance"]
    ]
    return as_csv(["arm", "low", "high", "tokens", "nll"], rows)


def search_figure(comparison: Comparison) -> Figure | None:
    """An Optuna search: the value of each trial with the best so far, and the best curve beside the linear one."""
    results = comparison.results
    search = results.get("search")
    done = [t for t in search["trials"] if t["value"] is not None] if search else []
    if not done:
        return None
    key, title, measure = f"{comparison.prefix}search", "Search for the keep curve", _measure(results)

    def build() -> Drawn:
        figure = canvas(WIDTH, 3.9)
        values, curves = figure.subplots(1, 2)
        hints = _trial_points(values, done, f"#{comparison.anchor()}")
        values.set(title="trials", xlabel="trial", ylabel=f"{measure} (nats/token)")
        _best_curve(curves, results, next((t for t in done if t["number"] == search["best"]), None))
        figure.legend(loc="outside right upper")
        return figure, hints

    caption = (
        f"Left: {measure} in nats/token of the {len(done)} finished trials{_where(search)} in the order they were run, "
        "and the lowest so far. Right: context tokens entering each layer in the best trial, beside the linear "
        "schedule at the same budget. The best of many trials is flattered by the choice; its own arm in the table is "
        "what counts."
    )
    if len(done) > MOST_TRIALS:
        caption += f" Of the trials every {_every(done)}th is drawn, the line is that of all; the CSV has all."
    rows = [[t["number"], t["value"], t["state"], *(t["keep_counts"] or [])] for t in search["trials"]]
    layers = max(len(t["keep_counts"] or []) for t in search["trials"])
    table = as_csv(["trial", "value", "state", *(f"layer_{layer}" for layer in range(layers))], rows)
    return Figure(key, title, caption, draw(key, title, build), table)


def _measure(results: Results) -> str:
    """What the search lowers."""
    far = (results["config"].get("search") or {}).get("objective") == "quality_far"
    return "far-token NLL" if far else "suffix NLL"


def _where(search: Mapping[str, Any]) -> str:
    """The windows that trials are judged on, where the file says."""
    return f" on {search['windows']:,} {search['split']} windows" if {"windows", "split"} <= search.keys() else ""


def _every(trials: Sequence[Mapping[str, Any]]) -> int:
    """One trial in so many is drawn."""
    return -(-len(trials) // MOST_TRIALS)


def _trial_points(axes: Axes, trials: Sequence[Mapping[str, Any]], url: str) -> dict[str, str]:
    """Trials as points that link to ``url``, and the lowest value so far; returns the hint of each marker by gid."""
    from matplotlib.ticker import MaxNLocator

    ordered = sorted(trials, key=lambda t: t["number"])
    numbers, lowest, so_far = [t["number"] for t in ordered], [], float("inf")
    for trial in ordered:
        so_far = min(so_far, trial["value"])
        lowest.append(so_far)
    axes.plot(numbers, lowest, drawstyle="steps-post", color=INK, label="lowest so far")
    hints = {}
    for trial in ordered[:: _every(ordered)]:
        gid = f"trial-{trial['number']}"
        look = curve_look(0) | {"linestyle": "none"}
        axes.plot([trial["number"]], [trial["value"]], gid=gid, url=url, **look)
        hints[gid] = f"trial {trial['number']}: {trial['value']:.4f} nats/token"
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return hints


def _best_curve(axes: Axes, results: Results, best: Mapping[str, Any] | None) -> None:
    linear = next((arm for arm in results["arms"] if arm["schedule"] == "linear"), None)
    layers = 1
    for index, (name, source) in enumerate((("best trial", best), ("linear", linear))):
        if source is not None and source["keep_counts"]:
            layers = max(layers, len(source["keep_counts"]))
            axes.plot(range(len(source["keep_counts"])), source["keep_counts"], label=name, **curve_look(index))
    axes.set_title("keep curve")
    _layer_axis(axes, layers, results["n_context"])
