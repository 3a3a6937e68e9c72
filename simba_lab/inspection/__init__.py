"""The inspection room: what a pruned model drops from a text, and how information flows in it. Numbers, no pictures."""

from __future__ import annotations

from simba_lab.inspection.dropping import inspect_tokens, parse_arms
from simba_lab.inspection.highways import measure_highways, work
from simba_lab.inspection.passage import Passage, from_held_out, from_text_file

__all__ = [
    "Passage",
    "from_held_out",
    "from_text_file",
    "inspect_tokens",
    "measure_highways",
    "parse_arms",
    "work",
]
