"""How the report writes numbers and foreign text, the same in the terminal, the page and the figures."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {
    "dense": "full dense model",
    "smaller_dense": "smaller dense model",
    "shorter_context": "same model, shorter context",
}


def inert(text: object) -> str:
    """Text in which control, direction-override and unpaired surrogate characters have become U+FFFD.

    What remains can neither move a terminal's cursor, nor reorder a line, nor break an XML parser. Line breaks and tabs
    stay.
    """
    return "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t" or char in _DIRECTION else char
        for char in str(text)
    )


_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shortened(text: str, length: int = 34) -> str:
    """At most `length` characters on one line, the middle left out, since names differ at both ends."""
    line = inert(text).replace("\n", " ").replace("\t", " ")
    if len(line) <= length:
        return line
    tail = length // 2
    return f"{line[: length - tail - 1]}\u2026{line[-tail:]}"


def kind_of(arm: Mapping[str, Any]) -> str:
    """ "linear / global_impact" for a pruned arm, the control's description otherwise."""
    parts = [part for part in (arm["schedule"], arm["criterion"]) if part]
    return KINDS.get(arm["kind"]) or inert(" / ".join(parts) or arm["kind"])


def gflops(flops: float) -> str:
    """FLOPs in units of 10^9, four significant digits at least: matched arms differ in the third."""
    value = flops / 1e9
    return f"{value:.2f}" if value >= 10 else f"{value:.4g}"


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Fixed digits; an em dash where there is no value."""
    return "\u2014" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def half_width(interval: Sequence[float] | None) -> float | None:
    return None if interval is None else (interval[1] - interval[0]) / 2


def p_text(p_value: float | None) -> str:
    if p_value is None:
        return "\u2014"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def seconds(value: float | None) -> str:
    if value is None:
        return "\u2014"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
