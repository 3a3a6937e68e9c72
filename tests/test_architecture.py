"""The rooms of the design page, enforced: who may import whom, and what no file may contain."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import simba_lab

ROOT = Path(simba_lab.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.glob("*.py"))

# Left of every other room; the numerical rooms need no files and no facts about the machine.
_LEAVES = {"errors", "registry", "environment", "files"}
_BELOW_TRAINING = _LEAVES | {"kernels", "pruning", "model", "budget", "checkpoint", "data"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "environment": set(),
    "files": set(),
    "registry": {"errors"},
    "kernels": {"errors", "registry"},
    "pruning": {"errors", "registry", "kernels"},
    "model": {"errors", "registry", "kernels", "pruning"},
    "budget": {"errors", "registry", "files", "kernels", "pruning", "model"},
    "checkpoint": {"errors", "registry", "files", "kernels", "pruning", "model"},
    "data": {"errors", "registry", "files"},
    "tasks": {"errors", "files", "data"},
    "training": _BELOW_TRAINING,
    "evaluate": _BELOW_TRAINING | {"tasks", "training"},
    "inspection": _BELOW_TRAINING | {"training", "evaluate"},
    "sweep": _BELOW_TRAINING | {"training", "evaluate"},
    "report": {"errors", "files"},
    "bench": _BELOW_TRAINING | {"training", "evaluate"},
    "cli": _BELOW_TRAINING | {"tasks", "training", "evaluate", "inspection", "sweep", "report", "bench"},
    # What `import simba_lab` offers; no room imports it.
    "face": {"errors", "model", "checkpoint", "pruning", "registry"},
    "__main__": {"cli"},
}
# Optional, or slow to import: importing our package must work without them.
HEAVY = ("triton", "mamba_ssm", "causal_conv1d", "numba", "lm_eval", "datasets", "transformers", "matplotlib", "optuna")
# Kernels written in Numba's language and the subclasses of the harness's model and task: they cannot do without, so
# nobody may import them before they are used.
CPU = ROOT / "kernels" / "cpu"
_OPS = ("__init__", "arrays", "dense", "gather", "impact_ops", "mamba2", "memory", "norm_ops", "scan_ops", "threads")
NUMBA_KERNELS = {*CPU.glob("*.py")} - {CPU / f"{name}.py" for name in _OPS}
TRITON_KERNELS = {*(ROOT / "kernels" / "gpu").glob("*.py")}
BOUND = NUMBA_KERNELS | TRITON_KERNELS | {ROOT / "evaluate" / "harness.py", ROOT / "tasks" / "wrapped_task.py"}
MAX_LINES = 400
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "face" if parts == ("__init__",) else parts[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """(room, line) of every import of ours, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = ["simba_lab.<relative import>"]
        elif isinstance(node, ast.ImportFrom) and node.module == "simba_lab":
            names = [f"simba_lab.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "simba_lab":
                yield (name.split(".") + ["face"])[1], node.lineno


def test_every_room_has_a_rule() -> None:
    assert {room_of(path) for path in FILES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_left(path: Path) -> None:
    room = room_of(path)
    allowed = MAY_IMPORT[room] | {room}
    wrong = [f"line {line}: {other}" for other, line in imported_rooms(path) if other not in allowed]
    assert not wrong, f"{room} may import {sorted(allowed)}"


def test_the_rules_have_no_cycle() -> None:
    left = dict(MAY_IMPORT)
    while left:
        free = [room for room, needs in left.items() if not needs & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda path: path.stem)
def test_names_say_what_is_inside(path: Path) -> None:
    assert path.stem not in DRAWERS
    assert path.parent.name not in DRAWERS


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_behaviour_hides_in_the_environment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        assert name not in {"environ", "environb", "getenv"}, f"line {node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path))


def test_import_needs_nothing_optional() -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import simba_lab; print(simba_lab.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "simba_lab\n"), done.stderr


@pytest.mark.parametrize("path", [path for path in FILES if path not in BOUND], ids=module_name)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    """At module level they would be loaded, or missed, by whoever imports the module for something else."""
    bound = {module_name(other) for other in BOUND}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        heavy = [name for name in names if name.split(".")[0] in HEAVY or name in bound]
        assert not heavy, f"line {node.lineno}: {heavy}"
