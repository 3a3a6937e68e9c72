"""Finished arms on disk. An arm is finished once its ``arm.json`` stands; it is never run again while its
fingerprint, the weights, windows and settings that decide its numbers, stays the same."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simba_lab.errors import InputError
from simba_lab.evaluate.windows import WindowScores
from simba_lab.files import clear_partial, write_json, writing

ARM_FILE, NLL_FILE = "arm.json", "nll.npy"


def digest(*parts: Any) -> str:
    """SHA-256 over arrays, files and plain data, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(str((part.dtype, part.shape)).encode())
            total.update(np.ascontiguousarray(part).data)
        elif isinstance(part, Path):
            total.update(part.read_bytes())
        else:
            total.update(json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()


@dataclass(frozen=True)
class StoredArm:
    """What an arm measured: nll (W, n_suffix) in nats, and its record as written."""

    nll: NDArray[np.float32]
    record: dict[str, Any]

    @property
    def flops(self) -> int:
        return sum(self.record["flops_by_op"].values())


class ArmStore:
    """The ``arms/`` folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Folder of an arm: its name made safe for any file system, made unique by a few digits of its digest."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', name).strip('-')}-{digest(name)[:6]}"

    def load(self, name: str, fingerprint: str) -> StoredArm | None:
        """The finished arm, or None if it is missing, unfinished or was measured under other conditions."""
        folder = self.path(name)
        try:
            record = json.loads((folder / ARM_FILE).read_text(encoding="utf-8"))
            nll = np.load(folder / NLL_FILE)
        except (OSError, EOFError, ValueError, SyntaxError, TokenError, RecursionError, MemoryError):  # np.load's
            return None
        if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
            return None
        if record.get("nll_digest") != digest(nll):
            raise InputError(f"{folder / NLL_FILE} is not what {ARM_FILE} says it wrote; delete the folder to rerun it")
        flops, seconds = record.get("flops_by_op"), record.get("wall_seconds")
        if not (isinstance(flops, dict) and all(type(count) is int for count in flops.values())):
            raise InputError(f"{folder / ARM_FILE} holds no FLOPs by op; delete the folder to rerun it")
        if not isinstance(seconds, int | float):
            raise InputError(f"{folder / ARM_FILE} holds no wall_seconds; delete the folder to rerun it")
        return StoredArm(nll, record)

    def save(self, name: str, fingerprint: str, scores: WindowScores, details: dict[str, Any]) -> StoredArm:
        """Writes the arm; what a killed process left half-written in its folder is removed."""
        folder = self.path(name)
        clear_partial(folder)
        with writing(folder / NLL_FILE) as partial, open(partial, "wb") as handle:
            np.save(handle, scores.nll)
        record = {
            **details,
            "fingerprint": fingerprint,
            "nll_digest": digest(scores.nll),
            "flops_by_op": scores.flops_by_op,
            "wall_seconds": scores.seconds,
        }
        write_json(folder / ARM_FILE, record)
        return StoredArm(scores.nll, record)
