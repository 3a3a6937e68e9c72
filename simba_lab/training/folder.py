"""One process at a time in an output folder, and one line for a disk that takes no more."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from simba_lab.errors import InputError
from simba_lab.files import refused_write

LOCK_FILE = ".lock"
SECONDS_TO_DIE = 10.0


class NoRoom(InputError):
    """The disk is full or not to be written to: nothing is wrong with the work itself."""


@contextmanager
def only_one(folder: Path, key: str = "folder", what: str = "sweep", shared: bool = False) -> Iterator[None]:
    """Holds ``folder``, which is made if it is missing, for this process; with ``shared``, for it and others like it.

    The kernel lets go of the folder when the process is gone, however it went. What was made is removed again if
    nothing was written. Raises InputError naming the folder, under ``key``, and the process that is at work in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder, key, what, shared)
    try:
        with handle:
            if not shared:
                _sign(handle)
            yield
    finally:
        _remove_if_empty(folder, made)


def _locked(folder: Path, key: str, what: str, shared: bool) -> IO[str]:
    """The open, locked file. Children of a killed process may outlive it by seconds: they are waited for."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + SECONDS_TO_DIE
    while True:
        handle = open(folder / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            holder = _read_signature(handle)
            handle.close()
            if not _gone(holder) or time.monotonic() > deadline:
                who = f" (process {holder[1]} on {holder[0]})" if holder else ""
                raise InputError(f"{key}: another {what} is running in {folder}{who}") from None
            time.sleep(0.1)


def _sign(handle: IO[str]) -> None:
    handle.truncate(0)
    handle.write(f"{os.uname().nodename} {os.getpid()}\n")
    handle.flush()


def _read_signature(handle: IO[str]) -> tuple[str, int] | None:
    handle.seek(0)
    host, _, number = handle.read().partition(" ")
    return (host, int(number)) if number.strip().isdigit() else None


def _gone(holder: tuple[str, int] | None) -> bool:
    if holder is None or holder[0] != os.uname().nodename:
        return False
    try:
        os.kill(holder[1], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _remove_if_empty(folder: Path, made: list[Path]) -> None:
    if folder not in made or not folder.is_dir() or [path.name for path in folder.iterdir()] != [LOCK_FILE]:
        return
    (folder / LOCK_FILE).unlink(missing_ok=True)
    for path in made:
        with suppress(OSError):
            path.rmdir()


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk or a folder that cannot be written to becomes NoRoom; what is written stays whole."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        refused = refused_write(error)
        if refused is None:
            raise
        raise NoRoom(f"cannot write: {refused}; the same command continues when that is put right") from error
