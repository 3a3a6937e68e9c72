"""Frame of the ``simba-lab`` command: finds the command, runs it, turns outcomes into exit codes.

A plain command is a module with ``configure(parser)`` and ``run(args) -> dict``; the frame gives it ``--json FILE``.
A result that holds ``exit_code`` decides the exit code.
A delegated command has its own command line: its module's ``main(argv)`` gets the arguments. Modules are imported
only when their command is called, so that ``simba-lab --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.files import finite, write_json

PROG = "simba-lab"
INTERRUPTED = 130
PIPE_CLOSED = 141

# name -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "sweep": ("simba_lab.cli.sweep", "compare arms at equal FLOPs; the same command again continues"),
    "eval": ("simba_lab.cli.eval", "held-out quality of a checkpoint, dense or pruned"),
    "flops": ("simba_lab.cli.flops", "FLOPs by op and by layer, for inference and training"),
    "generate": ("simba_lab.cli.generate", "go on from a prompt: dense or pruned prefill, then cached decoding"),
    "inspect": ("simba_lab.cli.inspect", "what a pruned model drops from a text, and how information flows past it"),
    "sensitivity": ("simba_lab.cli.sensitivity", "what pruning costs by the layer at which it begins"),
    "convert": ("simba_lab.cli.convert", "a model from one format into another: run, state-spaces, transformers"),
    "tasks": ("simba_lab.cli.tasks", "benchmarks and recall as tasks of the evaluation harness, without a network"),
    "report": ("simba_lab.cli.report", "table and report.html from the results of a sweep"),
    "bench": ("simba_lab.cli.bench", "time a training step beside other implementations"),
    "doctor": ("simba_lab.cli.doctor", "what is installed, which backends work here, why others do not"),
}
DELEGATED: dict[str, tuple[str, str]] = {
    "fit": ("simba_lab.cli.fit", "train from a config, e.g. fit --config experiments/base.yaml"),
    "validate": ("simba_lab.cli.fit", "one pass over the validation data"),
    "test": ("simba_lab.cli.fit", "one pass over the test data"),
    "predict": ("simba_lab.cli.fit", "predictions of a trained model"),
    "lm-eval": ("simba_lab.cli.lm_eval", "the evaluation harness's own command line, our model registered"),
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors take one line and that accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 2 bad input, 3 budgets do not match, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _offer_working_directory()
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        # A refused budget lists its arms, one per line; every other mistake takes one line.
        text = str(error) if isinstance(error, BudgetMismatch) else _one_line(str(error))
        print(f"{PROG}: error: {text}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; pointing stdout elsewhere keeps the interpreter's own flush at exit quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in _offered(DELEGATED):
        return _delegate(arguments)
    if arguments and arguments[0] in _offered(COMMANDS):
        return _run_command(arguments[0], arguments[1:])
    parser = _outer_parser()
    if not arguments:
        parser.print_help()
        return 0
    parser.parse_args(arguments)
    parser.error("name a command before its options")


def _delegate(arguments: list[str]) -> int:
    name = arguments[0]
    module = importlib.import_module(DELEGATED[name][0])
    # LightningCLI wants its subcommand among the arguments, the harness does not know ours.
    code = module.main(arguments[1:] if name == "lm-eval" else arguments)
    return 0 if code is None else int(code)


def _run_command(name: str, arguments: list[str]) -> int:
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = Parser(prog=f"{PROG} {name}", description=summary)
    module.configure(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result to FILE as JSON")
    args = parser.parse_args(arguments)
    if args.json is not None:
        _check_writable(args.json)
    result = module.run(args)
    if args.json is not None:
        write_json(args.json, finite(result))
    return result.get("exit_code", 0)


def _outer_parser() -> Parser:
    parser = Parser(prog=PROG, description="Which tokens may a state-space model drop, and how many at each depth?")
    parser.add_argument("--version", action="version", version=f"{PROG} {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for name, (_, summary) in (_offered(DELEGATED) | _offered(COMMANDS)).items():
        commands.add_parser(name, help=summary)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version(PROG)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, run from its source)"


def _offered(table: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: entry for name, entry in table.items() if importlib.util.find_spec(entry[0]) is not None}


def _offer_working_directory() -> None:
    """Let ``class_path: my_file.MyCriterion`` name a file where the command is called; installed packages go first."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


def _check_writable(path: Path) -> None:
    """A path that cannot be written must be refused before hours of work, not after."""
    try:
        folder = path.is_dir()
    except OSError as error:
        raise InputError(f"--json: {path}: {error.strerror}") from None
    if folder:
        raise InputError(f"--json: {path} is a folder; name a file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"--json: {path.parent} is not a folder that can be written to")


def _one_line(text: str) -> str:
    return " ".join(text.split())
