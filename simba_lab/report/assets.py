"""What the pages are put together from: files beside this one, and the policy that keeps them inert."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files


def asset(name: str) -> str:
    """Text of a file of this package."""
    return (files("simba_lab.report") / name).read_text(encoding="utf-8")


def content_policy(script: str) -> str:
    """Content security policy: this one script by its hash, nothing from outside, so text in data can never run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src 'sha256-{digest}'"
