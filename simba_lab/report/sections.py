"""The sections of words: the answer, what is left out, what the numbers cannot carry."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from simba_lab.report.folders import Comparison, Skipped
from simba_lab.report.markup import breakable, escape
from simba_lab.report.results import Arm
from simba_lab.report.wording import gflops


def answer(comparison: Comparison) -> str:
    """Both conclusions in a sentence or two, then the numbers that frame them."""
    results = comparison.results
    conclusion, url = results["conclusion"], f"#{comparison.anchor()}"
    matched = sum(arm["matched"] for arm in results["arms"])
    tiles = [
        ("budget per window", f"{gflops(results['budget_flops'])} GFLOPs"),
        ("tolerance", f"\u00b1{100 * results['tolerance']:g} %"),
        ("arms at equal FLOPs", f"{matched} of {len(results['arms'])}"),
        ("windows", f"{results['windows']:,}"),
        ("context + suffix", f"{results['n_context']:,} + {results['n_suffix']:,} tokens"),
        ("far tokens", f"{results['far_tokens']:,}"),
    ]
    cells = "".join(f'<div><dt>{escape(n)}</dt><dd><a href="{url}">{escape(v)}</a></dd></div>' for n, v in tiles)
    plain = _answer(comparison, "All suffix tokens", conclusion["sentence"], conclusion["best"])
    far = _answer(comparison, "Far tokens", conclusion["far_sentence"], conclusion["best_far"])
    return f'<div class="answers">{plain}{far}</div>\n<dl class="tiles">{cells}</dl>'


def _answer(comparison: Comparison, face: str, text: str, best: str | None) -> str:
    url = next((f"#{comparison.anchor(arm)}" for arm in comparison.results["arms"] if arm["name"] == best), None)
    name = f'<p class="winner">{_linked(breakable(best), url)}</p>' if best else ""
    lead, *details = re.split(r"(?<=\.) (?=[A-Z])", text)
    rest = "".join(f"<li>{_sentence(sentence, url)}</li>" for sentence in details)
    lead = f'<p class="lead">{_sentence(lead, url)}</p>'
    return f'<div class="answer"><h3>{face}</h3>{name}{lead}{f"<ul>{rest}</ul>" if rest else ""}</div>'


def _sentence(text: str, url: str | None) -> str:
    """The sentence with its measured numbers leading to the configuration of the best arm."""
    shown = escape(text).replace(" %", "&nbsp;%").replace("p = ", "p&nbsp;=&nbsp;")
    return re.sub(r"(?<![\w.=(&#])[+-]?\d+\.\d+(?![\w.)])", lambda found: _linked(found[0], url), shown)


def _linked(text: str, url: str | None) -> str:
    return text if url is None else f'<a href="{url}">{text}</a>'


def left_out(skipped: Sequence[Skipped]) -> str:
    """Folders that were given, or lie in the sweep's folder, and are not shown."""
    if not skipped:
        return ""
    rows = "".join(f"<li><code><bdi>{escape(one.path)}</bdi></code>: {escape(one.reason)}</li>" for one in skipped)
    return f'<ul class="left-out">{rows}</ul>'


def limits(comparison: Comparison) -> str:
    """What these numbers cannot carry, as far as the results themselves tell."""
    results, url = comparison.results, f"#{comparison.anchor()}"
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
    linked = (re.sub(r"\d[\d,.]*\d|\d", lambda found: _linked(found[0], url), escape(text)) for text in said if text)
    return "<ul>" + "".join(f"<li>{text}</li>" for text in linked) + "</ul>"


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
