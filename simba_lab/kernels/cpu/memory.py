"""Memory that the process has freed stays with the process.

glibc hands large blocks back to the kernel as soon as they are free, and the next training step pays for every page of
them again: 8 layers of width 256 on 2048 tokens, some 18,000 page faults a step. With the limits raised, a step reuses
the pages of the step before it.
"""

from __future__ import annotations

import ctypes
import functools

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_BLOCK = 32 << 20
"""Bytes above which a block is still mapped, and unmapped, on its own: the largest limit glibc accepts."""
_KEPT = 1 << 30
"""Free bytes at the end of the heap that are kept; what lies above goes back to the kernel."""


@functools.cache
def keep_freed() -> bool:
    """Raise the limits, once per process; False where the C library is not glibc, which is then left as it is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or a platform without a handle of the process
        return False
    return mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) == 1 and mallopt(_TRIM_THRESHOLD, _KEPT) == 1
