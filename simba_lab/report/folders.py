"""From run folders to what one page shows: comparisons at the page's budget, those at another, and what is left out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.report.results import Arm, Results, load_results, outside_budget
from simba_lab.report.wording import inert

RESULTS_FILE, ARM_FILE, NLL_FILE = "results.json", "arm.json", "nll.npy"


@dataclass(frozen=True)
class Skipped:
    """A folder that the page does not show, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One sweep as the page shows it.

    Args:
        results: checked contents of results.json; arms that are left out are no longer among them.
        prefix: of the page's ids, empty for the only sweep of a page.
        link: the sweep's folder relative to the page, percent-encoded; empty where the page stands in it.
        folder: where the sweep lies; None if there is nothing but its results.
        records: arm.json of every arm whose run folder is there, by the arm's name.
        trainings: what is known of the runs that trained the arms' weights, by run folder.
        most_drawn: arms that a picture shows at most.
        whole: whether the page holds every arm's keep counts and whole configuration.
    """

    results: Results
    prefix: str = ""
    link: str = ""
    folder: Path | None = None
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trainings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    most_drawn: int = 120
    whole: bool = True

    @property
    def name(self) -> str:
        return inert(self.results["name"])

    def anchor(self, arm: Arm | None = None) -> str:
        """Id of the embedded configuration of an arm, or of the sweep."""
        return f"config-{self.prefix}{'sweep' if arm is None else self._places[arm['name']]}"

    @cached_property
    def _places(self) -> dict[str, int]:
        return {arm["name"]: place for place, arm in reversed([*enumerate(self.results["arms"])])}

    def run_link(self, arm: Arm) -> str:
        """Relative address of the arm's run folder.

        The leading ./ keeps a run called `javascript:x` or `//host` a folder name.
        """
        return "/".join(part for part in (".", self.link, quote(inert(arm["run"]).strip("/"))) if part)


@dataclass(frozen=True)
class Gathered:
    """What a page is made of; `unequal` are comparisons, or single arms of one, that cost another budget."""

    comparisons: list[Comparison]
    unequal: list[Comparison] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def gather(paths: Sequence[Path], target: Path, allow_unequal: bool = False) -> Gathered:
    """Read run folders (or their results.json) for a page at `target`.

    The first readable folder sets the page's budget.

    Raises:
        InputError: no folder can be shown; says why.
        BudgetMismatch: arms or folders of another budget, unless `allow_unequal`.
    """
    read: list[Comparison] = []
    skipped: list[Skipped] = []
    for path in paths:
        try:
            comparison, missing = _read(path, target, allow_unequal)
        except BudgetMismatch:
            raise
        except InputError as error:
            if len(paths) == 1:
                raise
            skipped.append(Skipped(str(path), str(error).removeprefix(f"{path}: ")))
        else:
            read.append(comparison)
            skipped += missing
    if not read:
        raise InputError(f"none of the {len(paths)} folders can be shown; {skipped[0].path}: {skipped[0].reason}")
    return _by_budget(_with_prefixes(read), skipped, allow_unequal)


def _with_prefixes(read: Sequence[Comparison]) -> list[Comparison]:
    if len(read) == 1:
        return list(read)
    letters, read = string.ascii_lowercase, _told_apart(read)
    return [replace(one, prefix=f"{letters[i % 26] * (1 + i // 26)}-") for i, one in enumerate(read)]


def _told_apart(read: Sequence[Comparison]) -> list[Comparison]:
    """The folder of sweeps of one name becomes part of their names."""
    names = Counter(one.results["name"] for one in read)
    return [
        replace(one, results={**one.results, "name": f"{one.results['name']} ({one.folder})"})
        if names[one.results["name"]] > 1
        else one
        for one in read
    ]


def _by_budget(read: Sequence[Comparison], skipped: list[Skipped], allow_unequal: bool) -> Gathered:
    budget, tolerance = read[0].results["budget_flops"], read[0].results["tolerance"]
    others = [one for one in read if abs(one.results["budget_flops"] - budget) > tolerance * budget]
    if others and not allow_unequal:
        listed = ", ".join(f"{o.name} {o.results['budget_flops']}" for o in others)
        raise BudgetMismatch(
            f"{read[0].name} has a budget of {budget} FLOPs per window, others lie more than {100 * tolerance:g} % "
            f"from it: {listed}; --allow-unequal puts them in a section of their own"
        )
    same, unequal = [], list(others)
    for one in (one for one in read if one not in others):
        apart = outside_budget(one.results)
        if apart:
            unequal.append(replace(one, results={**one.results, "arms": apart}, prefix=f"{one.prefix}unequal-"))
        kept = [arm for arm in one.results["arms"] if arm not in apart]
        if kept:
            same.append(replace(one, results={**one.results, "arms": kept}))
    if not same:
        raise InputError(f"{read[0].name}: no arm costs the budget of {budget} FLOPs per window")
    return Gathered(same, unequal, skipped)


def _read(path: Path, target: Path, allow_unequal: bool) -> tuple[Comparison, list[Skipped]]:
    file = path if path.is_file() else path / RESULTS_FILE
    if not file.is_file():
        raise InputError(f"{path}: {_why_empty(path)}")
    results = load_results(file, allow_unequal)
    if version := _other_version(results):
        raise InputError(f"{path}: {version}")
    folder = file.parent
    records, missing = _arm_records(folder, results["arms"])
    gone = {one.path for one in missing}
    arms = [arm for arm in results["arms"] if str(folder / arm["run"]) not in gone]
    if not arms or arms[0] is not results["arms"][0]:
        raise InputError(f"{path}: the arm that the others are compared with is left out: {missing[0].reason}")
    link = os.path.relpath(folder.resolve(), target.parent.resolve())
    comparison = Comparison(
        {**results, "arms": arms}, link="" if link == "." else quote(link), folder=folder, records=records,
        trainings=_trainings(folder, records),
    )  # fmt: skip
    return comparison, missing


def _why_empty(path: Path) -> str:
    if not path.exists():
        return "no such folder or file"
    if (path / "run.json").is_file():
        return "the run folder of a training, it must be that of a sweep"
    measured = len(list(path.glob(f"arms/*/{ARM_FILE}")))
    if (path / "arms").is_dir():
        return f"incomplete: {measured} arms measured, no {RESULTS_FILE}; the sweep's own command goes on with it"
    return f"holds no {RESULTS_FILE}, it must be the folder of a finished sweep"


def _other_version(results: Results) -> str | None:
    """Why results of another release (its first two numbers) cannot stand beside ours; None if they can."""
    try:
        ours = importlib.metadata.version("simba-lab")
    except importlib.metadata.PackageNotFoundError:
        return None
    theirs = str(results["environment"].get("simba-lab", ours))
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        return None
    return f"written by simba-lab {theirs[:40]}, this is {ours}; run the sweep again with it"


def _arm_records(folder: Path, arms: Sequence[Arm]) -> tuple[dict[str, Any], list[Skipped]]:
    """arm.json of every arm, and the run folders that cannot be shown; none of either where `arms/` is not there."""
    if not (folder / "arms").is_dir():
        return {}, []
    records, missing = {}, []
    for arm in arms:
        record, reason = _arm_record(folder, arm)
        if reason:
            missing.append(Skipped(str(folder / arm["run"]), reason))
        else:
            records[arm["name"]] = record
    claimed = {(folder / arm["run"]).resolve() for arm in arms}
    for left in sorted(p for p in (folder / "arms").iterdir() if p.is_dir() and p.resolve() not in claimed):
        state = "measured, but not part of" if (left / ARM_FILE).is_file() else "unfinished, and not part of"
        missing.append(Skipped(str(left), f"{state} the comparison in {RESULTS_FILE}"))
    return records, missing


def _arm_record(folder: Path, arm: Arm) -> tuple[dict[str, Any], str]:
    run = (folder / arm["run"]).resolve()
    if not run.is_relative_to(folder.resolve()):
        return {}, "its run folder lies outside the sweep's"
    for name in (ARM_FILE, NLL_FILE):
        if not (run / name).is_file():
            return {}, f"its run folder is incomplete: {name} is missing"
    record = _json(run / ARM_FILE)
    if not isinstance(record.get("flops_by_op"), dict):
        return {}, f"its {ARM_FILE} is not one that this version writes"
    if record["flops_by_op"] != arm.get("flops_by_op", record["flops_by_op"]):
        return {}, f"its {ARM_FILE} holds another measurement than {RESULTS_FILE}; run the sweep again"
    return record, ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _trainings(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """config.yaml and run.json of the runs whose weights were used, as far as they still lie where they lay."""
    found = {}
    for name in dict.fromkeys(str(record["weights"]) for record in records.values() if record.get("weights")):
        for base in (*folder.resolve().parents, Path()):
            config = base / name / "config.yaml"
            if config.is_file():
                text = config.read_text(encoding="utf-8", errors="replace")
                found[name] = {"config": text, **_json(config.with_name("run.json"))}
                break
    return found
