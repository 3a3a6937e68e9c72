"""The frame of the benches of whole models: check a small one, measure the ceilings, then case by case."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from simba_lab.bench.floors import Ceilings, measure_ceilings
from simba_lab.bench.lines import Line, attempt, result
from simba_lab.bench.models import check_models


class Case(Protocol):
    """What is timed; ``what`` names it for people."""

    @property
    def what(self) -> str: ...


_C = TypeVar("_C", bound=Case)


@dataclass
class Session:
    """Where and how to measure; ``checks`` gathers the records of what was checked.

    ``ceilings`` are measured on the device unless given. ``keep`` is given the result so far after every case: what a
    time limit cuts short is not lost.
    """

    device: torch.device
    seed: int
    backend: str
    progress: Callable[[str], None]
    keep: Callable[[dict[str, Any]], None] = lambda result: None
    repeats: int = 9
    given_ceilings: Ceilings | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ceilings = self.given_ceilings

    def bench(self, name: str, cases: Sequence[_C], measure: Callable[[_C, Session], Iterable[Line]]) -> dict[str, Any]:
        """The JSON of the bench ``name``; nothing is timed if the small model of the check is wrong."""
        self.progress("correctness check")
        lines = attempt("models against the oracle", self._check)
        if not lines:
            self.progress("ceilings of the device")
            self.ceilings = self.ceilings or measure_ceilings(self.device)
            for case in cases:
                self.progress(case.what)
                lines += attempt(case.what, lambda case=case: measure(case, self))
                self.keep(self._result(name, lines))
        return self._result(name, lines)

    def _result(self, name: str, lines: list[Line]) -> dict[str, Any]:
        return result(name, lines, self.checks, backend=self.backend, seed=self.seed, ceilings=self.ceilings)

    def _check(self) -> list[Line]:
        self.checks += check_models(self.device, self.seed, self.backend)
        return []
