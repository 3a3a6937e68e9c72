"""Reading `results.json`: every key the report uses is checked once, so that nothing fails half-way through a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simba_lab.errors import BudgetMismatch, InputError

Results = Mapping[str, Any]
Arm = Mapping[str, Any]
Shape = Mapping[str, tuple[str, bool]]

ALPHA = 0.05
LARGEST = 1e300
"""Larger numbers, infinity and NaN are no results of anything, and products of them leave what a float holds."""

# key -> (what it must be, whether null is allowed)
_RESULTS: Shape = {
    "name": ("text", False),
    "created": ("text", False),
    "command": ("text", False),
    "budget_flops": ("a positive number", False),
    "tolerance": ("a number", False),
    "convention": ("text", False),
    "metric": ("text", False),
    "protocol": ("text", False),
    "n_context": ("a positive number", False),
    "n_suffix": ("a positive number", False),
    "windows": ("a number", False),
    "far_tokens": ("a number", False),
    "far_distance": ("a number", True),
    "environment": ("a mapping", False),
    "config": ("a mapping", False),
    "conclusion": ("a mapping", False),
    "arms": ("a list", False),
}
_CONCLUSION: Shape = {
    "sentence": ("text", False),
    "best": ("text", True),
    "not_separable": ("a list", False),
    "far_sentence": ("text", False),
    "best_far": ("text", True),
    "not_separable_far": ("a list", False),
}
_ARM: Shape = {
    "name": ("text", False),
    "kind": ("text", False),
    "criterion": ("text", True),
    "schedule": ("text", True),
    "matched": ("true or false", False),
    "flops": ("a positive number", False),
    "quality": ("a number", True),
    "quality_far": ("a number", True),
    "quality_interval": ("a pair of numbers", True),
    "quality_far_interval": ("a pair of numbers", True),
    "difference": ("a number", True),
    "difference_interval": ("a pair of numbers", True),
    "p_value": ("a number", True),
    "difference_far": ("a number", True),
    "difference_far_interval": ("a pair of numbers", True),
    "p_value_far": ("a number", True),
    "wall_seconds": ("a number", True),
    "run": ("text", False),
    "keep_counts": ("a list of numbers", False),
    "mean_keep": ("a number", True),
    "by_distance": ("a list", True),
}
_MAY_LACK = ("far_distance", "mean_keep", "search")
_CONFIG: Shape = {"search": ("a mapping", True)}
_BIN: Shape = {
    "low": ("a number", True),
    "high": ("a number", True),
    "tokens": ("a number", False),
    "nll": ("a number", True),
}
_SEARCH: Shape = {"trials": ("a list", False), "best": ("a number", True)}
_TRIAL: Shape = {
    "number": ("a number", False),
    "value": ("a number", True),
    "keep_counts": ("a list of numbers", True),
    "state": ("text", False),
}


def load_results(path: Path, allow_unequal: bool = False) -> dict[str, Any]:
    """The checked contents of a `results.json`.

    Raises:
        InputError: the file is missing or not JSON, or a key is absent or of the wrong kind; names the key.
        BudgetMismatch: an arm called matched whose FLOPs left the tolerance, unless `allow_unequal`; such arms are
            never put in one table.
    """
    results = _parse(path)
    _check(results, _RESULTS, path, "")
    _check(results["conclusion"], _CONCLUSION, path, "conclusion.")
    _check(results["config"], _CONFIG, path, "config.")
    if not results["arms"]:
        raise InputError(f"{path}: arms is empty, it must hold at least the arm the others are compared with")
    for index, arm in enumerate(results["arms"]):
        _check(arm, _ARM, path, f"arms[{index}].")
        for number, row in enumerate(arm["by_distance"] or []):
            _check(row, _BIN, path, f"arms[{index}].by_distance[{number}].")
    if results.get("search") is not None:
        _check(results["search"], _SEARCH, path, "search.")
        for index, trial in enumerate(results["search"]["trials"]):
            _check(trial, _TRIAL, path, f"search.trials[{index}].")
    if not allow_unequal:
        _check_budget(results, path)
    return results


def by_quality(results: Results) -> list[Arm]:
    """The arms, lowest NLL first; arms without a quality last, otherwise in the file's order."""
    return sorted(results["arms"], key=lambda arm: (arm["quality"] is None, arm["quality"] or 0.0))


def differs_from_first(arm: Arm, far: bool = False) -> bool:
    """Whether the arm's difference from the first arm may be claimed: corrected p < 0.05, interval clear of zero."""
    interval, p_value = arm[f"difference{_far(far)}_interval"], arm[f"p_value{_far(far)}"]
    return interval is not None and p_value is not None and p_value < ALPHA and (interval[0] > 0 or interval[1] < 0)


def standing(results: Results, arm: Arm, far: bool = False) -> str:
    """ "best", "tied" (not separable from the best), "unmatched" (outside the budget) or "" (separably worse)."""
    if not arm["matched"]:
        return "unmatched"
    conclusion = results["conclusion"]
    if arm["name"] == conclusion[f"best{_far(far)}"]:
        return "best"
    return "tied" if arm["name"] in conclusion[f"not_separable{_far(far)}"] else ""


def _far(far: bool) -> str:
    return "_far" if far else ""


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, it must be the results.json of a finished sweep") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    try:
        results = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}), it must be the results.json of a sweep") from None
    if not isinstance(results, dict):
        raise InputError(f"{path}: holds a {type(results).__name__}, it must be a JSON object with the key 'arms'")
    return results


def _check(value: Any, shape: Shape, path: Path, where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {where.rstrip('.')} must be a mapping with the keys {', '.join(shape)}")
    for key, (kind, may_be_null) in shape.items():
        if key not in value:
            if key in _MAY_LACK:
                continue
            raise InputError(f"{path}: key {where}{key} is missing, it must be {kind}")
        if not (may_be_null and value[key] is None) and not _is(kind, value[key]):
            raise InputError(f"{path}: {where}{key} is {str(value[key])[:60]!r}, it must be {kind}")


def _is(kind: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind == "a number":
        return number
    if kind == "a positive number":
        return number and value > 0
    if kind == "a list of numbers":
        return isinstance(value, list) and all(_is("a number", item) for item in value)
    if kind == "a pair of numbers":
        return _is("a list of numbers", value) and len(value) == 2
    return isinstance(value, {"text": str, "a list": list, "a mapping": dict, "true or false": bool}[kind])


def outside_budget(results: Results) -> list[Arm]:
    """Arms called matched whose FLOPs left the tolerance."""
    budget, tolerance = results["budget_flops"], results["tolerance"]
    return [arm for arm in results["arms"] if arm["matched"] and abs(arm["flops"] - budget) > tolerance * budget]


def _check_budget(results: Results, path: Path) -> None:
    budget = results["budget_flops"]
    outside = [
        f"{arm['name']} {arm['flops']} ({100 * (arm['flops'] / budget - 1):+.2f} %)" for arm in outside_budget(results)
    ]
    if outside:
        limit = f"{100 * results['tolerance']:g} % of budget_flops {budget}"
        raise BudgetMismatch(f"{path}: arms called matched must be within {limit}: {', '.join(outside)}")
