"""What a result was made with: versions, machine, code state. Recorded beside every number."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

RECORDED = ("simba-lab", "torch", "lightning", "numba", "numpy", "optuna", "fvcore", "tokenizers", "lm-eval", "scipy")


def describe() -> dict[str, str]:
    """Flat table of names and versions, all strings."""
    import torch

    table = {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_model()}
    table["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        table["gpu"] = torch.cuda.get_device_name()
    for package in RECORDED:
        try:
            table[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    table["commit"] = code_state()
    return table


def cpu_model() -> str:
    """Model name of the processor as the system gives it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_state() -> str:
    """Commit of the source tree, with ``+changes`` if files differ from it; ``unknown`` outside a repository."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--", str(here)], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes.stdout.strip() else "")


def command_line() -> str:
    """The command as it was typed, the program by its name alone, passwords in addresses left out."""
    import shlex

    return without_passwords(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def without_passwords(text: str) -> str:
    """``text`` with ``***`` for the password of every ``scheme://user:password@host`` in it."""
    return re.sub(r"(://[^/@:\s]*):[^@\s]+@", r"\1:***@", text)
