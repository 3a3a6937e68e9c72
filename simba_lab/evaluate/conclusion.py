"""What a comparison at equal FLOPs says, in plain sentences that claim no more than the intervals allow.

A difference is claimed only when its Holm-corrected p-value is below `alpha` and its interval leaves out zero;
everything else is called not separable. Arms are the dicts of `results.json`; `quality` is NLL in nats/token, so lower
is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simba_lab.evaluate.statistics import Comparison

Arm = Mapping[str, Any]
ALPHA = 0.05
_FACES = {"quality": ("NLL", "", ""), "quality_far": ("far-token NLL", "_far", " on far tokens")}


def best_arm(arms: Sequence[Arm], face: str = "quality") -> str | None:
    """Name of the matched arm with the lowest `face` ("quality" or "quality_far"); None when no matched arm has one.

    Arms that cost more FLOPs than the budget (`matched` false, the full dense model) cannot win.
    """
    measured = [arm for arm in arms if arm["matched"] and arm[face] is not None]
    return min(measured, key=lambda arm: arm[face])["name"] if measured else None


def separable(comparison: Comparison, alpha: float = ALPHA) -> bool:
    """Whether a difference may be claimed: (corrected) p below alpha, and an interval without zero."""
    if comparison.p_value is None or comparison.interval is None:
        return False
    low, high = comparison.interval
    return comparison.p_value < alpha and (low > 0 or high < 0)


def conclude(
    arms: Sequence[Arm],
    versus_best: Mapping[str, Comparison],
    versus_best_far: Mapping[str, Comparison],
    *,
    alpha: float = ALPHA,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The `conclusion` of `results.json`.

    Args:
        arms: all arms, the first being the one the others' `difference` and `p_value` refer to.
        versus_best: every other arm minus `best_arm(arms)` with Holm-corrected p, as `compare_all` returns.
        versus_best_far: the same for far tokens and `best_arm(arms, "quality_far")`; empty when nothing is far.
        alpha: corrected p below which a difference may be claimed.
        confidence: level of the intervals, only for the wording.

    Returns:
        sentence, best, not_separable (matched arms not separable from the best), and the same three with `_far`.
    """
    conclusion: dict[str, Any] = {}
    for face, comparisons in (("quality", versus_best), ("quality_far", versus_best_far)):
        suffix = _FACES[face][1]
        judge = _Judge(arms, face, comparisons, alpha, confidence)
        conclusion["far_sentence" if suffix else "sentence"] = " ".join(judge.sentences())
        conclusion[f"best{suffix}"] = judge.best["name"] if judge.best else None
        conclusion[f"not_separable{suffix}"] = judge.not_separable()
    return conclusion


class _Judge:
    """One face of quality: who is best, and what may be said about the others."""

    def __init__(
        self, arms: Sequence[Arm], face: str, versus_best: Mapping[str, Comparison], alpha: float, confidence: float
    ) -> None:
        self.arms, self.face, self.versus_best, self.alpha = arms, face, versus_best, alpha
        self.level = f"{100 * confidence:g} %"
        self.noun, self.suffix, self.where = _FACES[face]
        name = best_arm(arms, face)
        self.best = next((arm for arm in arms if arm["name"] == name), None)
        pruned = [arm for arm in arms if arm["kind"] == "pruned" and arm["matched"] and arm[face] is not None]
        self.best_pruned = min(pruned, key=lambda arm: arm[face]) if pruned else None

    def sentences(self) -> list[str]:
        if self.best is None:
            return [f"No matched arm has a {self.noun}: nothing was scored{self.where}, so nothing is concluded."]
        said = [self._winner(), self._first_arm(), self._shorter_context(), self._full_dense(), self._ties()]
        return [sentence for sentence in said if sentence]

    def not_separable(self) -> list[str]:
        """Matched arms, best first, that may be as good as the best one for all these windows tell."""
        if self.best is None:
            return []
        rivals = [arm for arm in self.arms if arm["matched"] and arm is not self.best and arm[self.face] is not None]
        rivals.sort(key=lambda arm: arm[self.face])
        return [arm["name"] for arm in rivals if not separable(self._against_best(arm), self.alpha)]

    def _winner(self) -> str:
        assert self.best is not None
        return f"At equal FLOPs, {_label(self.best)} has the lowest {self.noun}: {self.best[self.face]:.4f} nats/token."

    def _first_arm(self) -> str | None:
        """The best arm against the first one; when the first arm leads, the best pruned arm against it."""
        first = self.arms[0]
        challenger = self.best if self.best is not first else self.best_pruned
        if challenger is None or challenger is first or first[self.face] is None:
            return None
        comparison = self._against_first(challenger)
        if not separable(comparison, self.alpha):
            verb = "is not separable from"
        elif comparison.difference is not None and comparison.difference < 0:
            verb = "beats"
        else:
            verb = "loses to"
        who = "It" if challenger is self.best else f"The best pruned arm, {_label(challenger)},"
        return f"{who} {verb} {_label(first)}{self.where}: {self._numbers(comparison)}."

    def _shorter_context(self) -> str | None:
        """The control that any claim about pruning must beat: spend the same FLOPs on fewer, newer tokens."""
        control = next((a for a in self.arms if a["kind"] == "shorter_context" and a[self.face] is not None), None)
        pruned = self.best_pruned
        if control is None or self.best is None or control is self.arms[0]:
            return None
        if self.best is control:
            return self._pruned_under(control) if pruned else None
        comparison, best = self._against_best(control), self.best["name"]
        if not separable(comparison, self.alpha):
            return f"{_capital(_label(control))} is not separable from {best}: {self._numbers(comparison)}."
        return f"{_capital(_label(control))} is worse than {best}: {self._numbers(comparison)}."

    def _pruned_under(self, control: Arm) -> str:
        assert self.best_pruned is not None
        comparison = self._against_best(self.best_pruned)
        verb = "loses to" if separable(comparison, self.alpha) else "is not separable from"
        name = _label(self.best_pruned)
        return f"The best pruned arm, {name}, {verb} {_label(control)}{self.where}: {self._numbers(comparison)}."

    def _full_dense(self) -> str | None:
        """What the saved FLOPs cost: the unmatched full model against the best matched arm."""
        dense = next((a for a in self.arms if a["kind"] == "dense" and not a["matched"]), None)
        if dense is None or self.best is None or dense["name"] not in self.versus_best or dense[self.face] is None:
            return None
        comparison, best = self._against_best(dense), self.best["name"]
        start = f"{_capital(_label(dense))}, at {dense['flops'] / self.best['flops']:.2f} times the FLOPs,"
        if not separable(comparison, self.alpha):
            return f"{start} is not separable from {best}: {self._numbers(comparison)}."
        verdict = "better" if dense[self.face] < self.best[self.face] else "worse"
        return f"{start} is {verdict} than {best}: {self._numbers(comparison)}."

    def _ties(self) -> str:
        names = self.not_separable()
        rivals = sum(1 for arm in self.arms if arm["matched"] and arm[self.face] is not None) - 1
        if rivals == 0:
            return "No other matched arm was measured."
        if not names:
            return f"All {rivals} other matched arms are separably worse." if rivals > 1 else ""
        if len(names) == rivals:
            return f"None of the {rivals} other matched arms is separable from the best{self.where}."
        return f"Not separable from the best{self.where} ({len(names)} of {rivals}): {', '.join(names)}."

    def _against_first(self, arm: Arm) -> Comparison:
        keys = (f"difference{self.suffix}", f"difference{self.suffix}_interval", f"p_value{self.suffix}")
        difference, interval, p_value = (arm.get(key) for key in keys)
        return Comparison(difference, tuple(interval) if interval else None, p_value)

    def _against_best(self, arm: Arm) -> Comparison:
        return self.versus_best.get(arm["name"], Comparison(None, None, None))

    def _numbers(self, comparison: Comparison) -> str:
        if comparison.difference is None:
            return "they were not compared"
        text = f"difference {comparison.difference:+.4f} nats/token"
        if comparison.interval is None or comparison.p_value is None:
            return f"{text}, too few independent windows for an interval"
        low, high = comparison.interval
        p_value = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.3f}"
        return f"{text}, {self.level} interval {low:+.4f} to {high:+.4f}, corrected {p_value}"


def _label(arm: Arm) -> str:
    words = {"dense": "the full dense model", "smaller_dense": "the smaller dense model"}
    words["shorter_context"] = "the same model on a shorter context"
    return f"{words[arm['kind']]} ({arm['name']})" if arm["kind"] in words else arm["name"]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
