"""Finished (arm, task) results on disk, and result files of whole evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.records import read_record, read_scores
from simba_lab.evaluate.benchmarks.scores import TaskScores
from simba_lab.files import finite, write_json

KIND = "simba_lab benchmark results"
RESULTS = "results.json"


class ScoreStore:
    """``arms/`` below the folder of an evaluation: one file per arm, task and fingerprint, written when finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "arms"

    def path(self, arm: str, task: str, fingerprint: str) -> Path:
        """Other weights, documents or settings have another fingerprint and so another file."""
        return self.folder / _safe(arm) / f"{_safe(task)}-{fingerprint[:16]}.json"

    def load(self, arm: str, task: str, fingerprint: str) -> TaskScores | None:
        """What was measured under exactly these conditions; None if nothing was, or not to the end."""
        try:
            record = json.loads(self.path(arm, task, fingerprint).read_text(encoding="utf-8"))
            return read_scores(record["scores"]) if record["fingerprint"] == fingerprint else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def save(self, arm: str, fingerprint: str, scores: TaskScores) -> None:
        record = {"arm": arm, "fingerprint": fingerprint, "scores": scores.as_record()}
        write_json(self.path(arm, scores.task, fingerprint), finite(record))


@dataclass(frozen=True)
class ArmScores:
    """An arm over all tasks; ``details`` are plain data: pruning, fingerprint, weights."""

    name: str
    details: dict[str, Any]
    tasks: dict[str, TaskScores]

    @property
    def flops(self) -> int:
        return sum(scores.cost.flops for scores in self.tasks.values())

    @property
    def per_request(self) -> float:
        """FLOPs per request, over the requests of all tasks."""
        return self.flops / sum(scores.cost.requests for scores in self.tasks.values())

    def as_record(self) -> dict[str, Any]:
        tasks = {name: scores.as_record() for name, scores in self.tasks.items()}
        return {"name": self.name, "flops": self.flops, "flops_per_request": self.per_request} | self.details | {
            "tasks": tasks
        }  # fmt: skip


def as_results(arms: Mapping[str, ArmScores], about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a result file; ``about`` says how it was made."""
    return {"kind": KIND, **about, "arms": [arm.as_record() for arm in arms.values()]}


def read_results(path: Path) -> dict[str, ArmScores]:
    """The arms of a result file, by name. Raises InputError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise ValueError(f"its kind is not {KIND!r}")
        arms = read_record(content)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a result file of `simba-lab eval --tasks`") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no result file of `simba-lab eval --tasks` ({error})") from None
    return {name: ArmScores(name, details, tasks) for name, details, tasks in arms}


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", name).strip("-")
