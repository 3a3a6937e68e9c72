"""The tables of arms and of keep counts; every number leads to the configuration that it was measured with."""

from __future__ import annotations

from collections.abc import Sequence

from simba_lab.report.folders import Comparison
from simba_lab.report.markup import breakable, escape, table
from simba_lab.report.results import Arm, Results, by_quality, differs_from_first, standing
from simba_lab.report.wording import gflops, kind_of, number, p_text, seconds

_BADGES = {"best": "best", "tied": "\u2248 best", "unmatched": "outside budget", "": ""}


def arm_table(comparison: Comparison) -> str:
    """All arms, best first; every cell carries the number that its column is sorted by."""
    results = comparison.results
    first = escape(results["arms"][0]["name"])
    rows = "\n".join(_arm_row(comparison, arm) for arm in by_quality(results))
    heads = [
        ("Arm", "text", ""),
        ("GFLOPs", "number", "per window"),
        ("NLL", "number", "suffix tokens"),
        ("Far NLL", "number", "far tokens"),
        ("Difference", "number", f"from <bdi>{first}</bdi>"),
        ("p", "number", "corrected"),
        ("Far difference", "number", f"from <bdi>{first}</bdi>"),
        ("p far", "number", "corrected"),
        ("Keep", "number", "mean share"),
        ("Seconds", "number", "wall-clock"),
    ]
    caption = (
        "NLL and differences in nats/token, lower is better; in brackets the interval. \u2248 best: not separable from "
        "the best arm of that column. Faint differences may not be claimed: corrected p \u2265 0.05, or an interval "
        "that holds zero. Keep is the share of the arm's own context that enters a layer, averaged over layers. "
        f"{escape(results['convention']).rstrip('.')}. Choose a column to sort by it. Every number leads to the "
        "configuration it was measured with, further down; an arm's name opens its run folder's own file."
    )
    return table(f"{comparison.prefix}arms", caption, heads, rows, sorted_by="NLL")


def _arm_row(comparison: Comparison, arm: Arm) -> str:
    results, url = comparison.results, f"#{comparison.anchor(arm)}"
    place, far_place = standing(results, arm), standing(results, arm, far=True)
    note = "reference" if arm["difference"] is None else ""
    cells = [
        _cell(url, gflops(arm["flops"]), arm["flops"]),
        _measured(url, arm, "quality", place),
        _measured(url, arm, "quality_far", far_place),
        _difference(url, arm, far=False, note=note),
        _cell(url, p_text(arm["p_value"]), arm["p_value"]),
        _difference(url, arm, far=True, note=note),
        _cell(url, p_text(arm["p_value_far"]), arm["p_value_far"]),
        _cell(url, number(arm.get("mean_keep"), 3), arm.get("mean_keep")),
        _cell(url, seconds(arm["wall_seconds"]), arm["wall_seconds"]),
    ]
    link = f'<a href="{escape(comparison.run_link(arm))}/arm.json">{breakable(arm["name"])}</a>'
    # A pruned arm is mostly named after its schedule and criterion; saying so twice only costs a line.
    told = all(part in arm["name"] for part in (arm["schedule"], arm["criterion"]) if part) and arm["kind"] == "pruned"
    kind = "" if told else f"<small>{escape(kind_of(arm))}</small>"
    head = f'<th scope="row" data-value="{escape(arm["name"])}">{link}{kind}</th>'
    return f'<tr class="{place or "worse"}">{head}{"".join(cells)}</tr>'


def _cell(url: str, text: str, value: float | None, note: str = "", css: str = "") -> str:
    small = f"<small>{note}</small>" if note else ""
    key = "" if value is None else repr(value)
    shown = escape(text) if value is None else f'<a href="{url}">{escape(text)}</a>'
    return f'<td data-value="{key}"{f" class={css}" if css else ""}>{shown}{small}</td>'


def _measured(url: str, arm: Arm, face: str, place: str) -> str:
    badge = f'<span class="badge {place}">{_BADGES[place]}</span>' if place and arm[face] is not None else ""
    return _cell(url, number(arm[face]), arm[face], _bracket(arm[f"{face}_interval"]) + badge)


def _difference(url: str, arm: Arm, far: bool, note: str) -> str:
    key = "difference_far" if far else "difference"
    faint = "" if differs_from_first(arm, far) else "faint"
    shown = note or _bracket(arm[f"{key}_interval"], sign=True)
    return _cell(url, number(arm[key], sign=True), arm[key], shown, faint)


def _bracket(interval: Sequence[float] | None, sign: bool = False) -> str:
    return "" if interval is None else f"[{number(interval[0], sign=sign)}, {number(interval[1], sign=sign)}]"


def keep_table(comparison: Comparison) -> str:
    """Context tokens entering each layer, shaded by their share of the context."""
    results: Results = comparison.results
    layers = max((len(arm["keep_counts"]) for arm in results["arms"]), default=0)
    heads = [("Arm", "text", "")] + [(f"{layer}", "number", "layer") for layer in range(layers)]
    rows = "\n".join(_keep_row(comparison, arm, layers) for arm in by_quality(results))
    caption = (
        f"Context tokens entering each layer, of {results['n_context']:,}; shading is the share kept. "
        "Suffix tokens always pass."
    )
    return table(f"{comparison.prefix}keep-counts", caption, heads, rows)


def _keep_row(comparison: Comparison, arm: Arm, layers: int) -> str:
    url, n_context = f"#{comparison.anchor(arm)}", comparison.results["n_context"]
    counts = [*arm["keep_counts"], *[None] * (layers - len(arm["keep_counts"]))]
    cells = "".join(
        '<td data-value="">\u2014</td>'
        if k is None
        else f'<td class="shade" style="--share:{min(1.0, max(0.0, k / n_context)):.3f}" data-value="{k}">'
        f'<a href="{url}">{k}</a></td>'
        for k in counts
    )
    name = escape(arm["name"])
    return f'<tr><th scope="row" data-value="{name}">{breakable(arm["name"])}</th>{cells}</tr>'
