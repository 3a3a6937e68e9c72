"""Rows with a text field: JSON lines, parquet files and `datasets` names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from simba_lab.data.document import Document
from simba_lab.errors import InputError


def read_json_lines(name: str, path: Path, text: str, text_field: str) -> Iterator[Document]:
    """One document per JSON object line, named `NAME:LINE`; blank lines are passed over.

    Raises:
        InputError: A line that is not a JSON object or lacks a string in the field (file, line, fields present).
    """
    # Only \n ends a JSON line: str.splitlines would also break at characters that may stand inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{place}: not JSON; expected one object per line with the field '{text_field}'") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}: a JSON {type(row).__name__}; expected an object with the field '{text_field}'")
        yield Document(f"{name}:{number}", _field(row, text_field, place))


def read_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """One document per row of a parquet file, named `NAME:ROW` from 1; null texts are passed over.

    Raises:
        InputError: pyarrow is not installed, the file is not parquet, or the column is missing or not text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow; install it or convert the file to .jsonl") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _require_column(table.schema_arrow.names, text_field, str(path))
            batches = table.iter_batches(columns=[text_field])
            values = [value for batch in batches for value in batch.column(0).to_pylist()]
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable parquet file ({reason})") from None
    yield from _rows(name, values, text_field, str(path))


def read_hub(source: str, text_field: str, key: str) -> Iterator[Document]:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]` (split `train` unless named), through the `datasets` library.

    Raises:
        InputError: `datasets` is not installed, cannot load the name, or the column is missing or not text.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{key}: {source} needs the 'datasets' library; install it or give a local file") from None
    name, config, split, *rest = (*source.removeprefix("hf:").split(":"), "", "")[:4]
    if not name or (rest and rest[0]):
        raise InputError(f"{key}: {source} should read hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    # The library raises its own, hub, network and file system errors here, with no common base.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{key}: datasets cannot load {source}: {reason}") from None
    _require_column(rows.column_names, text_field, f"{key}: {source}")
    yield from _rows(f"{name}:{split or 'train'}", rows[text_field], text_field, source)


def _rows(name: str, values: Iterable[Any], text_field: str, place: str) -> Iterator[Document]:
    for number, value in enumerate(values, start=1):
        if value is not None:
            yield Document(f"{name}:{number}", _field({text_field: value}, text_field, f"{place}:{number}"))


def _require_column(present: list[str], text_field: str, place: str) -> None:
    if text_field not in present:
        raise InputError(f"{place}: no field '{text_field}' (present: {', '.join(present)}); set data.text_field")


def _field(row: dict[str, Any], text_field: str, place: str) -> str:
    _require_column(sorted(row), text_field, place)
    value = row[text_field]
    if not isinstance(value, str):
        raise InputError(f"{place}: field '{text_field}' is {type(value).__name__}, not text; set data.text_field")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place}: field '{text_field}' holds half a surrogate pair, which is not Unicode") from None
    return value
