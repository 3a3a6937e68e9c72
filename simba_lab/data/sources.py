"""Where documents come from: the embedded corpus, local files, texts of the data package, or a `datasets` name."""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from simba_lab.data.document import Document
from simba_lab.data.package_text import PREFIX, package_identity, read_package_text
from simba_lab.data.tables import read_hub, read_json_lines, read_parquet
from simba_lab.errors import InputError

KINDS = "give a file, a folder, a glob, 'stdlib', 'package:NAME' or 'hf:NAME'"
COMPRESSIONS = (".gz", ".bz2", ".xz")
# The name that backup programs and the like know a cache folder by (bford.info/cachedir).
CACHE_TAG = "CACHEDIR.TAG"
JSON_LINES = (".jsonl", ".json", ".ndjson")
TEXT = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".java", ".go", ".rs", ".tex", ".html", ".csv")
READABLE = (*TEXT, *JSON_LINES, ".parquet")
NOT_MODULES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def load_documents(source: str, text_field: str = "text", key: str = "data.source") -> list[Document]:
    """Reads every document of a source, in an order that depends on its content alone.

    Args:
        source: `stdlib` (the running Python's own modules), a file, a folder, a glob, `package:NAME` (see
            `simba_lab.data.package_text`) or `hf:NAME[:CONFIG[:SPLIT]]`. Text files are one document each; `.jsonl`,
            `.json`, `.ndjson` (one object per line) and `.parquet` one per row. Any of the text forms may be compressed
            (.gz, .bz2, .xz). In a folder, files of other kinds are passed over.
        text_field: The field of a JSON line, parquet row or `datasets` row that holds the text.
        key: The configuration key that named the source, for messages.

    Raises:
        InputError: Nothing there, nothing readable in it, binary or damaged files, lines without the field.
    """
    if source.startswith("hf:"):
        found = read_hub(source, text_field, key)
    elif source.startswith(PREFIX):
        found = read_package_text(source, key)
    else:
        found = (document for name, path in source_files(source, key) for document in _read(name, path, text_field))
    documents = [document for document in found if document.text.strip()]
    if not documents:
        raise InputError(f"{key}: {source} holds no text; name a file with at least one non-empty document")
    return documents


def source_identity(source: str, key: str = "data.source") -> list[list[str | int]]:
    """What a cache must compare to know that a source is unchanged: every file's name, path, size and time.

    A `datasets` name is taken at its word: its rows are not looked at again once cached.
    """
    if source.startswith("hf:"):
        return [[source]]
    if source.startswith(PREFIX):
        return package_identity(source, key)
    version: list[list[str | int]] = [[sys.version]] if source == "stdlib" else []
    files = [(name, path, path.stat()) for name, path in source_files(source, key)]
    return version + [[name, str(path.resolve()), stat.st_size, stat.st_mtime_ns] for name, path, stat in files]


def source_files(source: str, key: str = "data.source") -> list[tuple[str, Path]]:
    """(document or file name, path) of every file of a local source, sorted by name.

    Raises:
        InputError: No such file, or a folder without a readable kind of file.
    """
    if source == "stdlib":
        return _stdlib_modules()
    if not source.strip():
        raise InputError(f"{key}: empty; {KINDS}")
    path = Path(source).expanduser()
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        paths = [file for file in _walk(path) if _kind(file) in READABLE]
        if not paths:
            raise InputError(f"{key}: the folder {source} holds no file of a known kind ({', '.join(READABLE)})")
        return _named(paths)
    paths = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
    if not paths:
        raise InputError(f"{key}: no file {source}; {KINDS}")
    return _named(paths)


def open_bytes(path: Path) -> bytes:
    """The content of a file, decompressed by its suffix.

    Raises:
        InputError: It cannot be read, or the compressed stream is damaged.
    """
    decompress = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    try:
        return decompress(path.read_bytes())
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a complete {path.suffix} file") from None


def decode_text(path: Path, data: bytes) -> str:
    """UTF-8 text of a file's bytes; a leading byte-order mark is dropped, line ends stay as they are.

    Raises:
        InputError: A NUL byte or bytes that are not UTF-8.
    """
    if b"\0" in data:
        raise InputError(f"{path}: binary file (NUL byte at offset {data.index(0)}); expected UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert the file to UTF-8 text") from None


def _read(name: str, path: Path, text_field: str) -> Iterator[Document]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from read_parquet(name, path, text_field)
        return
    data = open_bytes(path)
    if not data:
        # An empty file among many (a package's __init__.py) is normal; load_documents refuses a source without text.
        return
    text = decode_text(path, data)
    if kind in JSON_LINES:
        yield from read_json_lines(name, path, text, text_field)
    else:
        yield Document(name, text)


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return suffixes[-1].lower() if suffixes else ""


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder, but for hidden ones and for caches: ours may well lie in the folder that it caches."""
    for place, folders, files in os.walk(folder):
        if CACHE_TAG in files:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _named(paths: list[Path]) -> list[tuple[str, Path]]:
    root = os.path.commonpath([path.parent for path in paths])
    return sorted((path.relative_to(root).as_posix(), path) for path in paths)


def _stdlib_modules() -> list[tuple[str, Path]]:
    """Dotted name and path of the standard library's modules: those every installation of the version carries.

    `sys.stdlib_module_names` leaves out what an installation adds (sitecustomize, _sysconfigdata_<machine>).
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or NOT_MODULES.intersection(parts[:-1]):
            continue
        if _is_utf8(path):
            modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return sorted(modules)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True
