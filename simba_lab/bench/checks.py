"""Correctness before any timing: error norms, poisoned memory, and the refusal that a red check is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

# Largest allowed ||ours - reference|| / ||reference||, the reference in fp64 on the same, already rounded inputs.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class RedCheck(RuntimeError):
    """A result is wrong: what it is called, its error and the allowed one. Nothing that uses it is timed."""


def relative_norm(got: Tensor, want: Tensor) -> float:
    """``||got - want|| / ||want||`` in fp64, in chunks; infinite for another shape or where a value is not a number."""
    if got.shape != want.shape:
        return float("inf")
    difference = size = 0.0
    for mine, other in zip(got.flatten().split(1 << 27), want.flatten().split(1 << 27), strict=True):
        mine, other = mine.double(), other.double()
        difference += float((mine - other).square().sum())
        size += float(other.square().sum())
    error = (difference / size) ** 0.5 if size else difference**0.5
    return error if error == error else float("inf")


def require(name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], allowed: float) -> dict[str, object]:
    """Record of a passed check: the worst of the named tensors. Raises RedCheck if one is further off than allowed."""
    error, where = max((relative_norm(got[key], want[key]), key) for key in want)
    if not error <= allowed:
        raise RedCheck(f"{name}: {where} is off by {error:.2e} (allowed {allowed:.0e})")
    return {"check": name, "worst": where, "error": error, "allowed": allowed}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, fresh memory of every device holds NaN, so that an element nobody wrote shows up in the result."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Only the filling is wanted; advice about algorithms that are not deterministic is not.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
