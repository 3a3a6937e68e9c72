"""The sections of the page, each a function from results to HTML; whatever comes from the file is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from simba_lab.report.drawing import Figure
from simba_lab.report.results import Arm, Results, by_quality, differs_from_first, standing
from simba_lab.report.wording import gflops, inert, kind_of, number, p_text, seconds

_BADGES = {"best": "best", "tied": "\u2248 best", "unmatched": "outside budget", "": ""}


def escape(text: object) -> str:
    """Inert HTML text, safe in an element and in a quoted attribute."""
    return html.escape(inert(text), quote=True)


def answer(results: Results) -> str:
    """Both conclusions in a sentence or two, then the numbers that frame them."""
    conclusion = results["conclusion"]
    matched = sum(arm["matched"] for arm in results["arms"])
    tiles = [
        ("budget per window", f"{gflops(results['budget_flops'])} GFLOPs"),
        ("tolerance", f"\u00b1{100 * results['tolerance']:g} %"),
        ("arms at equal FLOPs", f"{matched} of {len(results['arms'])}"),
        ("windows", f"{results['windows']:,}"),
        ("context + suffix", f"{results['n_context']:,} + {results['n_suffix']:,} tokens"),
        ("far tokens", f"{results['far_tokens']:,}"),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    plain = _answer("All suffix tokens", conclusion["sentence"], conclusion["best"])
    far = _answer("Far tokens", conclusion["far_sentence"], conclusion["best_far"])
    return f'<div class="answers">{plain}{far}</div>\n<dl class="tiles">{cells}</dl>'


def _answer(face: str, text: str, best: str | None) -> str:
    name = f'<p class="winner">{_breakable(best)}</p>' if best else ""
    return f'<div class="answer"><h3>{face}</h3>{name}<p>{escape(text).replace(" %", "&nbsp;%")}</p></div>'


def arm_table(results: Results) -> str:
    """All arms, best first; every cell carries the number that its column is sorted by."""
    first = escape(results["arms"][0]["name"])
    rows = "\n".join(_arm_row(results, arm) for arm in by_quality(results))
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
        "that holds zero. Keep is the share of the context that enters a layer, averaged over layers. "
        f"{escape(results['convention'])} Choose a column to sort by it; an arm's name opens its configuration in its "
        "run folder."
    )
    return _table("arms", caption, heads, rows, sorted_by="NLL")


def _table(name: str, caption: str, heads: Iterable[tuple[str, str, str]], rows: str, sorted_by: str = "") -> str:
    cells = "".join(
        f'<th scope="col" data-type="{kind}" aria-sort="{"ascending" if title == sorted_by else "none"}">'
        f'<button type="button">{title}</button><small>{note}</small></th>'
        for title, kind, note in heads
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {name}">'
        f'<table id="{name}" aria-describedby="{name}-note">'
        f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
        f'<p class="note" id="{name}-note">{caption}</p>'
    )


def _arm_row(results: Results, arm: Arm) -> str:
    place, far_place = standing(results, arm), standing(results, arm, far=True)
    note = "reference" if arm is results["arms"][0] else ""
    cells = [
        _cell(gflops(arm["flops"]), arm["flops"]),
        _measured(arm, "quality", place),
        _measured(arm, "quality_far", far_place),
        _difference(arm, far=False, note=note),
        _cell(p_text(arm["p_value"]), arm["p_value"]),
        _difference(arm, far=True, note=note),
        _cell(p_text(arm["p_value_far"]), arm["p_value_far"]),
        _cell(number(arm.get("mean_keep"), 3), arm.get("mean_keep")),
        _cell(seconds(arm["wall_seconds"]), arm["wall_seconds"]),
    ]
    link = f'<a href="{escape(_config_link(arm))}">{_breakable(arm["name"])}</a>'
    # A pruned arm is mostly named after its schedule and criterion; saying so twice only costs a line.
    told = all(part in arm["name"] for part in (arm["schedule"], arm["criterion"]) if part) and arm["kind"] == "pruned"
    kind = "" if told else f"<small>{escape(kind_of(arm))}</small>"
    head = f'<th scope="row" data-value="{escape(arm["name"])}">{link}{kind}</th>'
    return f'<tr class="{place or "worse"}">{head}{"".join(cells)}</tr>'


def _breakable(name: str) -> str:
    """A name that a narrow column breaks after a slash or underscore, isolated from the direction of its neighbours."""
    return f"<bdi>{escape(name).replace('/', '/<wbr>').replace('_', '_<wbr>')}</bdi>"


def _config_link(arm: Arm) -> str:
    """Relative by construction: the leading ./ keeps a run called `javascript:x` or `//host` a folder name."""
    return "./" + quote(inert(arm["run"]).strip("/")) + "/arm.json"


def _cell(text: str, value: float | None, note: str = "", css: str = "") -> str:
    small = f"<small>{note}</small>" if note else ""
    key = "" if value is None else repr(value)
    return f'<td data-value="{key}"{f" class={css}" if css else ""}>{escape(text)}{small}</td>'


def _measured(arm: Arm, face: str, place: str) -> str:
    badge = f'<span class="badge {place}">{_BADGES[place]}</span>' if place and arm[face] is not None else ""
    return _cell(number(arm[face]), arm[face], _bracket(arm[f"{face}_interval"]) + badge)


def _difference(arm: Arm, far: bool, note: str) -> str:
    key = "difference_far" if far else "difference"
    faint = "" if differs_from_first(arm, far) else "faint"
    return _cell(number(arm[key], sign=True), arm[key], note or _bracket(arm[f"{key}_interval"], sign=True), faint)


def _bracket(interval: Sequence[float] | None, sign: bool = False) -> str:
    return "" if interval is None else f"[{number(interval[0], sign=sign)}, {number(interval[1], sign=sign)}]"


def figure_section(figure: Figure) -> str:
    """A figure with its caption and downloads; the SVG and PNG are made from the picture on the page by the script."""
    data = "data:text/csv;charset=utf-8," + quote(figure.csv)
    return (
        f'<figure id="figure-{figure.key}"><h3>{escape(figure.title)}</h3>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="figure: {escape(figure.title)}">{figure.svg}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption>"
        f'<p class="downloads"><button type="button" data-save="svg" data-name="{figure.key}" hidden>SVG</button>'
        f'<button type="button" data-save="png" data-name="{figure.key}" hidden>PNG</button>'
        f'<a download="{figure.key}.csv" href="{data}">CSV</a></p></figure>'
    )


def keep_table(results: Results) -> str:
    """Context tokens entering each layer, shaded by their share of the context."""
    layers = max((len(arm["keep_counts"]) for arm in results["arms"]), default=0)
    heads = [("Arm", "text", "")] + [(f"{layer}", "number", "layer") for layer in range(layers)]
    rows = "\n".join(_keep_row(arm, layers, results["n_context"]) for arm in by_quality(results))
    caption = (
        f"Context tokens entering each layer, of {results['n_context']:,}; shading is the share kept. "
        "Suffix tokens always pass."
    )
    return _table("keep-counts", caption, heads, rows)


def _keep_row(arm: Arm, layers: int, n_context: int) -> str:
    counts = [*arm["keep_counts"], *[None] * (layers - len(arm["keep_counts"]))]
    cells = "".join(
        '<td data-value="">\u2014</td>'
        if k is None
        else f'<td class="shade" style="--share:{min(1.0, max(0.0, k / n_context)):.3f}" data-value="{k}">{k}</td>'
        for k in counts
    )
    name = escape(arm["name"])
    return f'<tr><th scope="row" data-value="{name}">{_breakable(arm["name"])}</th>{cells}</tr>'


def provenance(results: Results) -> str:
    """Command, versions, conventions and the resolved configuration."""
    facts = {
        "made": results["created"],
        "metric": results["metric"],
        "FLOPs": results["convention"],
        "budget": f"{results['budget_flops']:,} FLOPs per window, \u00b1{100 * results['tolerance']:g} %",
        "set by": results.get("budget_reference"),
        "protocol": _protocol(results["protocol"]),
        "statistics": _statistics(results),
    }
    made = _facts((name, value) for name, value in facts.items() if value)
    return (
        f'<h3>Command</h3><pre tabindex="0"><code>{escape(results["command"])}</code></pre>'
        f"<h3>Definitions</h3>{made}<h3>Machine and versions</h3>{_facts(results['environment'].items())}"
        f"{_folded('Configuration of the sweep', results['config'])}"
        + _folded("Specification of every arm", {arm["name"]: arm.get("spec", {}) for arm in results["arms"]})
        + _folded(
            "FLOPs by operation, per window", {arm["name"]: arm.get("flops_by_op", {}) for arm in results["arms"]}
        )
    )


def _facts(pairs: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{items}</dl>'


def _folded(title: str, value: Any) -> str:
    text = escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f'<details><summary>{escape(title)}</summary><pre tabindex="0"><code>{text}</code></pre></details>'


def _protocol(name: str) -> str:
    if name == "suffix":
        return "suffix: tokens are scored at the last context token, quality is measured on the suffix only"
    return f"{name}: acausal where selection sees the tokens it is then judged on" if name == "full" else name


def _statistics(results: Results) -> str:
    recorded = results.get("statistics")
    if recorded:
        return (
            "; ".join(f"{key}: {value}" for key, value in recorded.items()) if isinstance(recorded, dict) else recorded
        )
    return (
        "paired over the same windows: percentile bootstrap of the ratio of summed NLL to scored tokens, two-sided "
        "sign-flip permutation test of the paired differences, Holm correction over the comparisons with the first arm"
    )


def limits(results: Results) -> str:
    """What these numbers cannot carry, as far as the results themselves tell."""
    arms = results["arms"]
    scored = results["windows"] * results["n_suffix"]
    tied = len(results["conclusion"]["not_separable"])
    layers = sorted({len(arm["keep_counts"]) for arm in arms if arm["keep_counts"]})
    said = [
        f"Measured on {results['windows']:,} windows of {results['n_context']:,} + {results['n_suffix']:,} tokens: "
        f"{scored:,} scored tokens, {results['far_tokens']:,} of them "
        f"({100 * results['far_tokens'] / max(1, scored):.1f} %) far. Longer contexts were not measured.",
        f"The models have {' or '.join(map(str, layers)) or 'no'} layers; nothing here says what larger ones do.",
        f"The windows do not separate {tied} of the matched arms from the best on plain NLL." if tied else "",
        _seed_spread(arms),
        "Intervals and p-values describe the choice of windows. They hold the trained weights fixed: another training "
        "run of the same model may shift every number.",
        "Wall-clock was taken once per arm on the machine named above and carries no interval.",
    ]
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in said if text) + "</ul>"


def _seed_spread(arms: Sequence[Arm]) -> str:
    """How far apart arms lie that differ in nothing but their seed."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for arm in arms:
        if arm["kind"] == "pruned" and arm["criterion"] == "random" and arm["quality"] is not None:
            groups.setdefault((arm["schedule"],), []).append(arm["quality"])
    spreads = [max(values) - min(values) for values in groups.values() if len(values) > 1]
    if not spreads:
        return ""
    return f"Arms that differ only in the seed of the random criterion lie up to {max(spreads):.4f} nats/token apart."
