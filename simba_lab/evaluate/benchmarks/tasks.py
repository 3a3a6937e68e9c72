"""Tasks of the evaluation harness by name: ours without a network, files and folders of tasks, the harness's own."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.errors import InputError
from simba_lab.evaluate.benchmarks.run import without_bars
from simba_lab.tasks import DEFAULT_FOLDER, PAPER6, ensure_paper6, in_width, offline_manager, offline_twin

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

GROUP = "paper6"
_BUILT = (GROUP, *(benchmark.task for benchmark in PAPER6))
_NEAR = 0.75
_YAML = (".yaml", ".yml")


def load_tasks(
    names: Sequence[str],
    folder: Path = DEFAULT_FOLDER,
    say: Callable[[str], None] = print,
    line_width: int | None = None,
) -> dict[str, Task]:
    """The tasks of ``names`` in their order, groups unfolded.

    Args:
        names: ``paper6``, names of tasks or groups, YAML files, or folders of tasks. Names are looked up among ours,
            which are built if they are missing, then below ``folder``, then among the harness's own.
        folder: where ours are kept.
        say: told what takes long.
        line_width: take the six in lines of so many characters at most; None as published.

    Raises InputError for an unknown name, with near ones, for a task whose documents cannot be had, with the one that
    needs no network, and for one that is in other lines than asked for.
    """
    _quiet_harness()
    if line_width is not None and any(name in _BUILT for name in names):
        ensure_paper6(folder, line_width)
        names = [in_width(name, line_width) if name in _BUILT else name for name in names]
    with without_bars(unless=sys.stderr.isatty()):
        tasks = _loaded(names, folder, say)
    for name, task in tasks.items():
        _check_width(name, task, line_width)
    return tasks


def _check_width(name: str, task: Task, line_width: int | None) -> None:
    """What is recorded and kept under a width must be in that width, by whatever name or file it came."""
    found = (task.config.metadata or {}).get("line_width")
    if found != line_width:
        lines, wanted = ("as published" if width is None else f"in width {width}" for width in (found, line_width))
        raise InputError(f"--line-width: {name} is {lines}, not {wanted}; {GROUP} and its tasks come in any width")


def _loaded(names: Sequence[str], folder: Path, say: Callable[[str], None]) -> dict[str, Task]:
    paths = {
        name: Path(name) for name in names if Path(name).exists() and (os.sep in name or Path(name).suffix in _YAML)
    }
    plain = [name for name in names if name not in paths]
    for name in plain:
        if Path(name).suffix in _YAML or os.sep in name:
            raise InputError(f"--tasks: there is no file or folder {name}")
    manager = _manager(plain, [path for path in paths.values() if path.is_dir()], folder, say)
    tasks: dict[str, Task] = {}
    for name in names:
        wanted = _tasks_in(manager, paths[name]) if name in paths and paths[name].is_dir() else [name]
        for one in wanted:
            tasks |= _load(manager, one)
    return tasks


def _manager(plain: Sequence[str], folders: Sequence[Path], folder: Path, say: Callable[[str], None]) -> TaskManager:
    """An index that knows every plain name; the harness's own, which take it long to read, only if need be."""
    if any(name in _BUILT for name in plain):
        ensure_paper6(folder)
    places = [folder, *folders]
    ours = offline_manager(places)
    missing = [name for name in plain if name not in ours.task_index]
    for name in missing:
        _refuse_misspelt(name, [*_BUILT, *ours.all_tasks], _NEAR)
    if not missing:
        return ours
    say(f"looking up {', '.join(missing)} among the harness's own tasks, which takes some 15 s")
    everything = offline_manager(places, include_stock=True)
    for name in missing:
        if name not in everything.task_index:
            _refuse_misspelt(name, [*_BUILT, *everything.all_tasks], 0.0)
    return everything


def _refuse_misspelt(name: str, known: Sequence[str], cutoff: float) -> None:
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=cutoff)
    if near:
        raise InputError(f"--tasks: {name!r} is unknown; near it: {', '.join(near)}")


def _tasks_in(manager: TaskManager, folder: Path) -> list[str]:
    here = folder.resolve()
    entries = [(name, manager.task_index[name].yaml_path) for name in manager.all_subtasks]
    found = [name for name, path in entries if path and here in Path(path).resolve().parents]
    if not found:
        raise InputError(f"--tasks: {folder} holds no task of the evaluation harness (a YAML file with the key task)")
    return found


def _load(manager: TaskManager, name: str) -> dict[str, Task]:
    try:
        return _ready(manager.load([name])["tasks"])
    except ConnectionError:
        twin = offline_twin(name)
        instead = f"use {twin}, the same task offline" if twin else "none of the offline tasks stands in for it"
        raise InputError(f"--tasks: {name} needs the network for its documents; {instead}") from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"--tasks: {name} cannot be loaded: {error}") from None


def _ready(tasks: dict[str, Any]) -> dict[str, Task]:
    """As the harness's own entry leaves them: no examples in the prompt unless the task says so, its seed fixed."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return tasks


def _quiet_harness() -> None:
    """Our own lines say what runs; of the harness's and the hub's, only what went wrong."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
