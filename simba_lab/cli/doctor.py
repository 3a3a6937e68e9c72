"""``simba-lab doctor``: what is installed, which backends work here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.bench.machine import describe
from simba_lab.errors import InputError

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.console import Console

DISTRIBUTION = "simba-lab"
EXAMPLES = """examples:
  simba-lab doctor
  simba-lab doctor --json doctor.json

exit code: 0 if everything required is here in a version that fits, 2 if not
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """``doctor`` takes no arguments of its own."""
    parser.description = "Says what is installed, which backends work on this machine, and why the others do not."
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Examine and print. ``exit_code`` in the result is 2 if a required package is missing or out of range."""
    from rich.console import Console

    result = {
        "machine": describe() | {"free_disk_bytes": shutil.disk_usage(Path.cwd()).free},
        "gpus": gpus(),
        "packages": packages(),
        "backends": backends(),
        "compile_cache": compile_cache(),
    }
    _print(Console(), result)
    wrong = [f"{entry['name']} ({entry['problem']})" for entry in result["packages"] if _is_fatal(entry)]
    if wrong:
        reason = f"required packages do not fit: {', '.join(wrong)}; run `make setup`"
        print(f"{DISTRIBUTION}: error: {reason}", file=sys.stderr)
    return result | {"exit_code": 2 if wrong else 0}


def backends() -> dict[str, dict[str, str | None]]:
    """Device type -> backend name -> None if usable there, else the reason why not."""
    import torch

    from simba_lab.kernels import available_backends

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: available_backends(device) for device in devices}


def gpus() -> list[dict[str, Any]]:
    """CUDA devices that torch can use: name and memory in bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory_bytes": device.total_memory} for device in found]


def packages() -> list[dict[str, Any]]:
    """Every direct dependency: the range asked for, the version found, and what is wrong with it, if anything.

    Raises InputError if simba-lab itself is not installed, for then its ranges are not known.
    """
    return [_examine(extra, requirement) for extra, requirement in _requirements()]


def compile_cache() -> dict[str, Any]:
    """Where Numba keeps compiled kernels. Without a writable place every process compiles them again."""
    import numba

    try:
        compiled = numba.njit(cache=True)(lambda value: value)
    except RuntimeError as error:
        return {"writable": False, "path": None, "reason": " ".join(str(error).split())}
    return {"writable": True, "path": compiled.stats.cache_path, "reason": None}


def _requirements() -> Iterator[tuple[str, Requirement]]:
    """(extra or "", requirement) of every dependency that this platform has."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{DISTRIBUTION} is not installed in this Python: run `make setup`") from None
    extras = metadata.get_all("Provides-Extra") or []
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        for extra in ["", *extras]:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield extra, requirement
                break


def _examine(extra: str, requirement: Requirement) -> dict[str, Any]:
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        installed, problem = None, "not installed"
    else:
        fits = requirement.specifier.contains(installed, prereleases=True)
        problem = None if fits else f"{installed} is not in {requirement.specifier}"
    return {
        "name": requirement.name,
        "required": str(requirement.specifier),
        "installed": installed,
        "extra": extra or None,
        "problem": problem,
    }


def _is_fatal(entry: dict[str, Any]) -> bool:
    return entry["problem"] is not None and entry["extra"] is None


def _print(console: Console, result: dict[str, Any]) -> None:
    console.print(_section("machine", ["", "found"], _machine_rows(result)))
    rows = [
        [entry["name"], entry["extra"] or "required", entry["required"], entry["installed"] or "-", _verdict(entry)]
        for entry in result["packages"]
    ]
    console.print(_section("packages", ["package", "needed for", "range", "installed", ""], rows))
    rows = [
        [name, device, reason or "[green]works here[/]"]
        for device, reasons in result["backends"].items()
        for name, reason in reasons.items()
    ]
    console.print(_section("kernel backends", ["backend", "on", ""], rows))


def _machine_rows(result: dict[str, Any]) -> list[list[str]]:
    machine, cache = result["machine"], result["compile_cache"]
    cards = [f"{card['name']} ({_gigabytes(card['memory_bytes'])})" for card in result["gpus"]]
    return [
        ["Python", machine["python"]],
        ["platform", machine["platform"]],
        ["processor", f"{machine['cpu']}, {machine['cores']} cores"],
        ["memory", _gigabytes(machine["memory_bytes"])],
        ["free disk here", _gigabytes(machine["free_disk_bytes"])],
        ["torch build", machine["torch"]],
        ["GPU", ", ".join(cards) or "none that torch can use"],
        ["compiled kernels", "kept between runs" if cache["writable"] else f"[red]not kept:[/] {cache['reason']}"],
    ]


def _section(title: str, headings: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _verdict(entry: dict[str, Any]) -> str:
    if entry["problem"] is None:
        return "[green]ok[/]"
    return f"[red]{entry['problem']}[/]" if _is_fatal(entry) else f"[yellow]{entry['problem']}[/] (optional)"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
