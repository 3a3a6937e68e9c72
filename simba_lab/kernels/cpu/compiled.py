"""Compiles the CPU kernels in a process of their own, so that the first run computes the same bits as every later one.

Numba optimises the body of a parallel loop twice: once alone, for the process that compiles it, and once more within
the kernel that it writes to its cache. Floating-point sums may be reordered each time, so that the process that
compiled a kernel computed other last bits than those that loaded it. Here nobody runs what he compiled: a kernel that
is not in the cache is compiled by a helper process and then loaded like any other.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache

from simba_lab.kernels.cpu.elementary import FAST

SHARED = ("blocks.py", "denormals.py", "elementary.py", "impact.py", "scan_forward.py", "vectors.py")
"""Files whose functions become part of kernels in other files."""
IDLE_SECONDS = 30.0
"""A helper that is not asked for anything for so long ends; the next kernel starts another."""


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: a parallel Numba kernel, compiled once per signature, processor and state of its sources."""
    dispatcher = numba.njit(parallel=True, fastmath=FAST, error_model="numpy")(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError:  # no folder that can be written to: every process compiles for itself
        warnings.warn(f"no place to keep compiled kernels: set NUMBA_CACHE_DIR ({function.__name__})", stacklevel=2)
    return dispatcher


class _Cache(FunctionCache):
    """Numba's cache of one kernel, in which what is missing is compiled by the helper before it is looked up."""

    compiling_here = False

    def load_overload(self, sig: tuple[Any, ...], target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)
        if found is None and not self.compiling_here and _helper(os.getpid()).compile(self._py_func, sig):
            found = super().load_overload(sig, target_context)
        return found

    def _index_key(self, sig: tuple[Any, ...], codegen: Any) -> tuple[Any, ...]:
        """Also the sources that kernels are built from: Numba itself sees only changes of the kernel's own file."""
        return (*super()._index_key(sig, codegen), _shared_sources())


@functools.cache
def _shared_sources() -> str:
    files = [Path(__file__).with_name(name) for name in SHARED]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _helper(pid: int) -> _Helper:
    """One for each process: a fork does not share its parent's pipes."""
    helper = _Helper()
    atexit.register(helper.close)
    return helper


class _Helper:
    """The process that compiles; started when first needed and again after it has ended."""

    process: subprocess.Popen[str] | None = None

    def compile(self, function: Callable[..., None], sig: tuple[Any, ...]) -> bool:
        """Whether the kernel is in the cache now; if not, it has been said why."""
        request = json.dumps([function.__module__, function.__name__, [_described(argument) for argument in sig]])
        for _ in range(2):  # it may have ended, idle, in the moment in which it was asked
            try:
                pipe = self._pipe()
                pipe.stdin.write(request + "\n")
                pipe.stdin.flush()
                failure = json.loads(pipe.stdout.readline())
            except (OSError, ValueError):  # no line is no JSON either
                self.close()
                continue
            break
        else:
            failure = "it ended"
        if failure:
            warnings.warn(f"{function.__name__} was not compiled by its helper: {failure}", stacklevel=2)
        return not failure

    def _pipe(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.close()
            code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self.process

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.terminate()  # closing alone would not do: a fork of this process may hold its pipe open
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()
                except OSError:  # a request that it has not read
                    pass
            process.wait()


def serve() -> None:
    """Compile what standard input asks for until it is closed or nothing has been asked for a while."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    answers, sys.stdout = sys.stdout, sys.stderr
    _Cache.compiling_here = True
    while select.select([sys.stdin], [], [], IDLE_SECONDS)[0] and (line := sys.stdin.readline()):
        module, name, sig = json.loads(line)
        try:
            _compile(getattr(importlib.import_module(module), name), tuple(map(_type, sig)))
            failure = ""
        except Exception:
            failure = traceback.format_exc(limit=-1).strip().splitlines()[-1]
        print(json.dumps(failure), file=answers, flush=True)


def _described(argument: types.Type) -> list[Any]:
    """A number's or an array's type as plain data; the names are NumPy's."""
    if isinstance(argument, types.Array):
        return [str(argument.dtype), argument.ndim, argument.layout, not argument.mutable, argument.aligned]
    return [str(argument)]


def _type(described: list[Any]) -> types.Type:
    name, *shape = described
    number = numba.from_dtype(np.dtype(name))
    return types.Array(number, shape[0], shape[1], readonly=shape[2], aligned=shape[3]) if shape else number


def _compile(dispatcher: Any, sig: tuple[Any, ...]) -> None:
    """Into the cache, unless another process' helper has just done it."""
    cache = dispatcher._cache
    os.makedirs(cache.cache_path, exist_ok=True)
    with open(Path(cache.cache_path) / ".compiling", "a") as lock:  # closing it releases it
        fcntl.flock(lock, fcntl.LOCK_EX)
        dispatcher.compile(sig)
