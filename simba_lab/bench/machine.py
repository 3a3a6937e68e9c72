"""What a measured time depends on besides versions: cores, memory, and how busy the machine was."""

from __future__ import annotations

import os
from typing import Any

from simba_lab import environment


def describe() -> dict[str, Any]:
    """Versions, processor, ``cores``, ``memory_bytes`` and ``load_1min`` (the load average as of now)."""
    versions = {key: value for key, value in environment.describe().items() if key != "threads"}
    load = round(os.getloadavg()[0], 2)
    return versions | {"cores": usable_cores(), "memory_bytes": memory_bytes(), "load_1min": load}


def usable_cores() -> int:
    """Cores that this process may run on, fewer than the machine has under a CPU set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
