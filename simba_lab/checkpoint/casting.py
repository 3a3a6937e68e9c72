"""Mapped weights in another dtype, in the memory of the result alone."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_PAGEOUT = 21
"""MADV_PAGEOUT of Linux 5.4 and later: the pages leave memory and come back if read. Python's mmap does not name it."""


def cast(weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Change every weight, in place of the mapping.

    What was read of a mapped file stays in memory until the whole file is let go, which would add the file's size to
    the peak; so each weight's pages are given back as soon as it has been read.
    """
    for name, weight in weights.items():
        if weight.dtype != dtype:
            weights[name] = weight.to(dtype)
            _give_back(weight)


def _give_back(weight: Tensor) -> None:
    """Advice alone: where the system cannot take it, nothing but memory is lost."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    first, end = -(-weight.data_ptr() // page) * page, (weight.data_ptr() + weight.nbytes) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(_PAGEOUT))
