"""The unit of every source: a named text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text and the name that identifies it on every machine (never an absolute path)."""

    name: str
    text: str
