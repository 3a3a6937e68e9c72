"""What a sweep file may say. Typed and strict: an unknown key is an error that names it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from simba_lab.errors import InputError
from simba_lab.training.mistakes import read_yaml

OneSpec = str | dict[str, Any]
Specs = OneSpec | list[OneSpec]
Convolution = Literal["compacted", "adjacent"]


@dataclass(frozen=True)
class BudgetConfig:
    """The FLOPs of one window that every matched arm must cost.

    Args:
        reference: name of the arm whose cost is the budget.
        share: of that cost, for budgets between two models.
        flops: or an absolute number.
        tolerance: largest relative distance from it.
    """

    reference: str | None = None
    share: float = 1.0
    flops: int | None = None
    tolerance: float = 0.005


@dataclass(frozen=True)
class StatisticsConfig:
    """How intervals and p-values are computed.

    Args:
        resamples: bootstrap resamples, and sign flips of the permutation test.
        confidence: of the intervals.
        seed: of both.
    """

    resamples: int = 10_000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class ArmConfig:
    """One entry of ``arms``; lists of criteria and schedules stand for all their pairs.

    Args:
        kind: pruned; dense (the full model, not matched); smaller_dense (a dense model of its own experiment);
            shorter_context (the dense model on the newest part of the context).
        name: how tables call it; pruned arms are called schedule:criterion unless named.
        experiment: the file that trains the arm's weights; null is the sweep's own (not for a smaller_dense arm).
        criterion: name, class path, or class_path + init_args; or a list of them.
        schedule: likewise.
        protect_recent: share of the kept tokens that are the newest.
        convolution: compacted reads whatever stands beside a token now, adjacent its true neighbours only.
    """

    kind: Literal["pruned", "dense", "smaller_dense", "shorter_context"] = "pruned"
    name: str | None = None
    experiment: str | None = None
    criterion: Specs | None = None
    schedule: Specs | None = None
    protect_recent: float = 0.0
    convolution: Convolution = "compacted"


@dataclass(frozen=True)
class SearchConfig:
    """A search for the best ``knots`` curve under the budget.

    Args:
        criterion: name, class path, or class_path + init_args.
        n_values: heights of the curve that are searched.
        trials: curves tried, the anchors (linear, geometric, uniform) among them.
        split: windows it is judged on; never those of the comparison.
        windows: how many of them.
        objective: face of quality that is minimised.
        convolution: as of an arm.
        lowest: smallest share of its predecessor that a height may have.
        seed: of the sampler.
    """

    criterion: OneSpec = "global_impact"
    n_values: int = 4
    trials: int = 40
    split: Literal["validation", "train"] = "validation"
    windows: int = 200
    objective: Literal["quality", "quality_far"] = "quality"
    convolution: Convolution = "compacted"
    lowest: float = 0.1
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a number out of range."""
        for key in ("n_values", "trials", "windows"):
            if getattr(self, key) < 1:
                raise InputError(f"search.{key} must be at least 1, got {getattr(self, key)}")
        if not 0 < self.lowest <= 1:
            raise InputError(f"search.lowest must lie in (0, 1], got {self.lowest}")
        if self.seed < 0:
            raise InputError(f"search.seed must be at least 0, got {self.seed}")


@dataclass(frozen=True)
class RecallConfig:
    """What is planted in every window, to be recalled at its suffix; only the answer is then scored.

    Args:
        form: sentence (facts about persons), pair (a list of places and things), or passage (64 tokens that come back).
        facts: how many are planted together; one is asked for.
        distance: tokens between what is planted and the question, which ends the context.
        seed: decides facts and questions.
    """

    distance: int
    form: Literal["sentence", "pair", "passage"] = "sentence"
    facts: int = 1
    seed: int = 0


@dataclass(frozen=True)
class SweepConfig:
    """A comparison of arms at one budget.

    Args:
        experiment: file of the base model, trained first if its run folder does not hold it.
        folder: where results go; null is runs/sweeps/<name of the sweep file>.
        split: windows of the comparison.
        windows: how many at most; they never share a suffix token.
        n_context: context tokens of a window.
        n_suffix: suffix tokens, on which quality is measured.
        batch_size: windows at once.
        device: that measures the arms; auto takes a GPU where there is one, cpu, cuda or cuda:N that one.
        dtype: of the weights while they are measured; null keeps that of their file.
        recall: plant facts in the windows and score their recall; null scores the text itself.
        budget: what every matched arm costs.
        arms: the first one is what the others are compared with.
        search: look for the best keep curve, which then joins the arms.
        statistics: resampling.
    """

    experiment: str
    budget: BudgetConfig
    arms: list[ArmConfig]
    folder: str | None = None
    split: Literal["test", "validation"] = "test"
    windows: int = 500
    n_context: int = 960
    n_suffix: int = 64
    batch_size: int = 8
    device: str = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    recall: RecallConfig | None = None
    search: SearchConfig | None = None
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)

    def check(self) -> None:
        """Raises InputError for a number out of range or a budget given twice or not at all."""
        for key in ("windows", "n_context", "n_suffix", "batch_size"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} must be at least 1, got {getattr(self, key)}")
        if (self.budget.reference is None) == (self.budget.flops is None):
            raise InputError("budget: give either reference (the name of an arm) or flops")
        if not 0 < self.budget.share <= 1 or (self.budget.flops is not None and self.budget.share != 1):
            raise InputError(f"budget.share: of the reference's cost, must lie in (0, 1], got {self.budget.share}")
        if not self.arms:
            raise InputError("arms: name at least one")
        if self.search:
            self.search.check()
        if not 0 < self.statistics.confidence < 1 or self.statistics.resamples < 100:
            raise InputError("statistics: confidence must lie in (0, 1), resamples be at least 100")
        if self.statistics.seed < 0:
            raise InputError(f"statistics.seed must be at least 0, got {self.statistics.seed}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_SECTIONS = {
    "budget": BudgetConfig, "arms": ArmConfig, "recall": RecallConfig, "search": SearchConfig,
    "statistics": StatisticsConfig,
}  # fmt: skip


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Sweep file with ``key.key=value`` overrides laid over it.

    Raises InputError naming the key for anything that is missing, unknown or of the wrong type.
    """
    values = read_yaml(Path(path), "sweep")
    for override in overrides:
        _overrule(values, override)
    return parse_sweep(values, str(path))


def parse_sweep(values: dict[str, Any], called: str) -> SweepConfig:
    """The sweep that plain data describes. Raises InputError naming ``called`` and the key that is wrong."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    strict = ConfigDict(extra="forbid")
    for part in (SweepConfig, *_SECTIONS.values()):
        part.__pydantic_config__ = strict
    try:
        config = TypeAdapter(SweepConfig).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{called}: {_first_mistake(error.errors())}") from None
    config.check()
    return config


def _overrule(values: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set: {override!r} should be key=value, e.g. windows=100 or search.trials=80")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place[_step(place, parent, key)] if isinstance(place, list) else place.setdefault(parent, {})
        if not isinstance(place, (dict, list)):
            raise InputError(f"--set: {parent} in {key!r} has no keys of its own")
    try:
        place[_step(place, last, key)] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set: the value of {key}, {text!r}, is not YAML") from None


def _step(place: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """``part`` of a dotted key as an index of ``place``: entries of a list are named by their number from 0."""
    if isinstance(place, dict):
        return part
    if not (part.isdecimal() and int(part) < len(place)):
        raise InputError(f"--set: {part} in {key!r} is no entry of a list of {len(place)}; they are numbered from 0")
    return int(part)


def _first_mistake(errors: Sequence[Any]) -> str:
    """The first error as ``arms.2.criterion: what is wrong``; alternatives of a union are left out of the path."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("str", "dict[", "list[")))
    if first["type"] == "unexpected_keyword_argument":
        known = [f.name for f in dataclasses.fields(_SECTIONS.get(place.split(".")[0], SweepConfig))]
        key = place.split(".")[-1]
        near = difflib.get_close_matches(key, known, n=1)
        return f"{place} is not a key{f' (did you mean {near[0]}?)' if near else ''}; keys here: {', '.join(known)}"
    return f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"[:300]
