"""Writing files whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REFUSED = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR,
    errno.EEXIST,
}  # fmt: skip
# What libraries that write by themselves say of the same errors.
_REFUSED_TEXT = re.compile(
    r"No space left on device|Read-only file system|File too large|os error (?:27|28|30|122)\b"
    r"|\d+ requested and \d+ written|PytorchStreamWriter failed writing"
    r"|(?:database or )?disk is full|readonly database|disk I/O error"
    r"|unable to open database file"
)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on leaving it is flushed to disk and takes the place of ``path``.

    After an exception ``path`` is as it was. After a kill the temporary file may be left, see :func:`clear_partial`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """The content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_partial(folder: Path) -> None:
    """Removes from ``folder`` what killed processes had not finished writing; nobody may be writing there."""
    for partial in folder.glob(".*.partial"):
        partial.unlink(missing_ok=True)


def refused_write(error: BaseException) -> str | None:
    """One line for an error that came of a full disk, a quota or a folder that is not writable; None for any other."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _REFUSED:
            where = f"{seen.filename}: " if seen.filename else ""
            return f"{where}{seen.strerror or seen}"
        if found := _REFUSED_TEXT.search(str(seen)):
            return found[0]
        seen = seen.__cause__ or seen.__context__
    return None


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON; NaN and infinities are refused, JSON has none."""
    with writing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same data with null for NaN and infinities, for :func:`write_json`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
