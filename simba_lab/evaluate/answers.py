"""Answers of one arm, kept on disk as they come: an interrupted run continues from what it had scored.

One append-only file for each arm, a JSON line for each answer. A line that a killed process left unfinished, or
that holds no answer, is skipped, and its request is answered again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simba_lab.errors import InputError


class AnswerBook:
    """Answers by key in ``path``, which is created with its folder. Raises InputError if it cannot be written."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the arm
            written = path.read_bytes()
        except OSError as error:
            raise InputError(f"answers: {path} cannot be written: {error.strerror}") from None
        self.known = dict(_entries(written.splitlines()))
        if written and not written.endswith(b"\n"):
            self._file.write(b"\n")

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer: plain data. It survives the process from here on."""
        self.known[key] = answer
        self._file.write(json.dumps([key, answer]).encode() + b"\n")


def _entries(lines: Iterable[bytes]) -> Iterable[tuple[str, Any]]:
    for line in lines:
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(key, str) and _is_answer(answer):
            yield key, answer


def _is_answer(value: Any) -> bool:
    """A text, a log-likelihood, or a log-likelihood with whether it was the greedy choice."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], bool):
        value = value[0]
    return isinstance(value, str | float) or type(value) is int


def request_keys(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[str]:
    """SHA-256 of each request: what is asked for, its arguments, and which repetition of the same request it is."""
    seen: Counter[str] = Counter()
    keys = []
    for arguments in requests:
        text = json.dumps([kind, *arguments], sort_keys=True, default=str)
        keys.append(hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest())
        seen[text] += 1
    return keys
