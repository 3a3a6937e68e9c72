"""``simba-lab lm-eval``: the evaluation harness's own command line, with our model registered."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from simba_lab.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Hand ``argv`` (``run ...``, ``ls ...``, ``validate ...``) to the harness and return its exit code.

    Raises InputError for what our model refuses and for tasks that the harness does not know.
    """
    from lm_eval.__main__ import cli_evaluate

    from simba_lab.evaluate.harness import register

    register()
    with _arguments(argv):
        try:
            cli_evaluate()
        except SystemExit as stop:
            return _exit_code(stop)
        except ValueError as error:
            if not str(error).startswith("Tasks not found"):
                raise
            raise InputError(f"--tasks: {error}; `simba-lab lm-eval ls tasks` lists what there is") from None
    return 0


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
