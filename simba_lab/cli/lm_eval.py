"""``simba-lab lm-eval``: the evaluation harness's own command line, with our model registered."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from simba_lab.errors import InputError
from simba_lab.tasks import PAPER6, ensure_paper6, offline_twin

OFFLINE = ("paper6", *(benchmark.task for benchmark in PAPER6))
"""The paper's benchmarks as they are without a network."""
UNKNOWN = "Tasks not found: "


def main(argv: Sequence[str]) -> int:
    """Hand ``argv`` (``run ...``, ``ls ...``, ``validate ...``) to the harness and return its exit code.

    Our offline tasks are found by their names: they are built if they are missing. Raises InputError for what our
    model refuses, for tasks that the harness does not know, and for tasks whose documents need a network.
    """
    asked = _asked(argv)
    ours = [name for name in asked.tasks if name in OFFLINE]
    added = ["--include_path", str(ensure_paper6())] if ours and asked.include_path is None else []

    from lm_eval.__main__ import cli_evaluate

    from simba_lab.evaluate.harness import register

    register()
    with _arguments([*argv, *added]):
        try:
            cli_evaluate()
        except SystemExit as stop:
            return _exit_code(stop)
        except ConnectionError as error:
            raise InputError(f"--tasks: {_without_network(asked.tasks, str(error))}") from None
        except ValueError as error:
            unknown = str(error).partition(UNKNOWN)[2]
            if not unknown:
                raise
            raise InputError(f"--tasks: {_unknown(unknown.split(', '), asked.include_path)}") from None
    return 0


def _asked(argv: Sequence[str]) -> argparse.Namespace:
    """The two options of ``run`` that say which tasks, and where they are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="*", default=[])
    parser.add_argument("--include_path")
    try:
        asked, _ = parser.parse_known_args(argv[1:] if argv[:1] == ["run"] else [])
    except SystemExit:
        # The harness says better what is wrong with its own options.
        asked = argparse.Namespace(tasks=[], include_path=None)
    asked.tasks = [name for text in asked.tasks for name in text.split(",") if name]
    return asked


def _without_network(tasks: Sequence[str], reason: str) -> str:
    twins = [f"{twin} for {task}" for task in tasks if (twin := offline_twin(task))]
    instead = f"without one use {', '.join(twins)}" if twins else f"offline there are {', '.join(OFFLINE)}"
    return f"the documents of {', '.join(tasks)} need the network ({reason}); {instead}"


def _unknown(names: Sequence[str], include_path: str | None) -> str:
    known = [*OFFLINE, *_task_names(include_path)]
    told = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=3)
        told.append(f"{name!r} is unknown" + (f", near it: {', '.join(near)}" if near else ""))
    return "; ".join(told) + "; `simba-lab lm-eval ls tasks` lists what there is"


def _task_names(include_path: str | None) -> list[str]:
    """Names by file: reading what thousands of task files hold would take many seconds."""
    import lm_eval

    folders = [Path(lm_eval.__file__).parent / "tasks", *([Path(include_path)] if include_path else [])]
    return sorted({file.stem for folder in folders for file in folder.rglob("*.yaml")})


@contextmanager
def _arguments(argv: Sequence[str]) -> Iterator[None]:
    """The harness reads (and edits) the arguments of the process, so it gets a list of its own."""
    before = sys.argv
    sys.argv = ["simba-lab lm-eval", *argv]
    try:
        yield
    finally:
        sys.argv = before


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1
