"""Processes of a sweep that do not outlive it, each with its share of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from simba_lab.errors import InputError

# PR_SET_PDEATHSIG = 1: the kernel kills the child with the thread that started it, however that ended. Exec keeps it.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if hasattr(ctypes.CDLL(None), "prctl"):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def start(arguments: Sequence[str], settings: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    """A Python process with these arguments and ``KEY=VALUE`` settings of its environment.

    It is killed when the calling thread ends; the parent must therefore wait for it in that thread.
    """
    python = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *arguments]
    return subprocess.Popen(["env", *settings, *python] if settings else python, **options)


def ended(code: int) -> str:
    """How a process ended, in words."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def shares(workers: int, gpus_per_worker: int | None = None) -> list[list[str]]:
    """Settings of each worker: CPU threads divided, GPUs handed out in turn, one to a worker.

    Workers share the GPUs where there are fewer; with ``gpus_per_worker`` each has so many that no other has. Raises
    InputError if this host has too few for that.
    """
    import torch

    threads = max(1, torch.get_num_threads() // workers)
    numbers = [f"{key}={threads}" for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")]
    gpus, each = _gpus(), gpus_per_worker or 1
    if gpus_per_worker is not None and workers * each > len(gpus):
        raise InputError(
            f"--gpus-per-worker: {each} for each of {workers} worker{'s' * (workers > 1)} makes {workers * each}, "
            f"this host has {len(gpus)}; lower it or --workers"
        )
    given = [[gpus[(worker * each + i) % len(gpus)] for i in range(each)] if gpus else [] for worker in range(workers)]
    return [[*numbers, *([f"CUDA_VISIBLE_DEVICES={','.join(names)}"] if names else [])] for names in given]


def _gpus() -> list[str]:
    """Names that mean the same device in every process, whichever devices this one was given."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
