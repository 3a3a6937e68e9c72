"""Spoilt input by the thousand, and a judge: no traceback, no hang, no memory beyond a limit, no file in a wrong place.

A case is (target, seed, number) and nothing else, so that a failure is repeated by its name:
``python tests/fuzzing.py TARGET SEED FIRST COUNT SEEDS WORK``. Cases run in a process of their own, whose address
space is limited to a gigabyte more than it has when it begins; the processor time of a case is limited to five seconds.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SECONDS, MEMORY, WALL_SECONDS = 5.0, 1 << 30, 120.0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_ESCAPES = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")

LONG, DEEP = "a" * 5000, 3000
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 2**31, 2**63, 10**30, -(2**63), 0.0, 0.5, -0.5, 1.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "null", "nan", "1e999", "\x00", "\n", "\ud7ff", "日本語",
    "<script>alert(1)</script>", "../escape", "/dev/null/x", ".", "..", "~", "%s%n", "${HOME}", "!!python/object", LONG,
    "os.system", "builtins.eval", "simba_lab.nothing", "linear", "norm", "auto", [], {}, [None], {"": None},
    [[]], {"a": {"b": 1}}, {"class_path": "os.system"}, {"class_path": "linear", "init_args": {}}, [1, "a", None],
)  # fmt: skip


def spoilt_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of plain data in which up to three places hold, lack or are called something else."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return rng.choice(SCALARS)
        _spoil_place(rng, *rng.choice(places))
    return rng.choice(SCALARS) if rng.random() < 0.01 else tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def _spoil_place(rng: random.Random, owner: Any, key: Any) -> None:
    kind, value = rng.random(), owner[key]
    if kind < 0.55:
        owner[key] = copy.deepcopy(rng.choice(SCALARS))
    elif kind < 0.65 and isinstance(value, int | float) and not isinstance(value, bool):
        owner[key] = rng.choice((-value, value + 1, value - 1, value * 10**9, value / 3, str(value)))
    elif kind < 0.8:
        del owner[key]
    elif isinstance(owner, dict):
        renamed = rng.choice((f"{key}x", str(key)[1:], rng.choice(("", "a", "class_path", LONG))))
        owner[renamed] = owner.pop(key) if rng.random() < 0.5 else copy.deepcopy(value)
    else:
        owner.extend(copy.deepcopy(owner[: rng.randint(1, 3)]))


def spoilt_bytes(rng: random.Random, raw: bytes) -> bytes:
    """A copy of ``raw`` that is cut, flipped, doubled or has something foreign in it."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, width = rng.randrange(len(raw) + 1), rng.choice((1, 2, 8, 100))
        kind = rng.randrange(5)
        if kind == 0:
            raw[place : place + width] = rng.randbytes(width)
        elif kind == 1:
            del raw[place : place + width]
        elif kind == 2:
            raw[place:place] = rng.choice(
                (b"\x00", b"\xff\xfe", b"{", b"[" * DEEP, b"'", b": ", b"\n", b"&a *a ", b"9" * 5000)
            )
        elif kind == 3:
            del raw[place:]
        else:
            start = rng.randrange(len(raw) + 1)
            raw[place:place] = raw[start : start + width]
    return bytes(raw)


def spoilt_text(rng: random.Random, tree: Any, write: Callable[[Any], str]) -> bytes:
    """Plain data as a file: spoilt before it is written, after, or both."""
    kind = rng.random()
    text = write(tree if kind > 0.75 else spoilt_tree(rng, tree)).encode("utf-8", "surrogatepass")
    return spoilt_bytes(rng, text) if kind > 0.7 else text


class Hang(BaseException):
    """A case has used up its processor time."""


@dataclass(frozen=True)
class Failure:
    """What a case did that it must not."""

    target: str
    number: int
    what: str
    where: str

    @property
    def kind(self) -> str:
        """``files outside``, ``hangs``, ``out of memory``, or ``tracebacks`` for everything else."""
        starts = {"escape": "files outside", "Hang": "hangs", "no end": "hangs", "MemoryError": "out of memory"}
        return next((kind for start, kind in starts.items() if self.what.startswith(start)), "tracebacks")


@dataclass(frozen=True)
class Tally:
    """How many cases were run, and the worst of them.

    Args:
        cases: that were run.
        seconds: of processor time that the slowest took.
        memory: most bytes that a process of cases held, the program itself included.
        failures: of the cases that failed.
    """

    cases: int
    seconds: float = 0.0
    memory: int = 0
    failures: tuple[Failure, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.cases + other.cases, max(self.seconds, other.seconds), max(self.memory, other.memory),
            self.failures + other.failures,
        )  # fmt: skip

    def __str__(self) -> str:
        kinds = Counter(failure.kind for failure in self.failures)
        bad = ", ".join(f"{kinds[kind]} {kind}" for kind in ("tracebacks", "hangs", "out of memory", "files outside"))
        return f"{self.cases:,} cases: {bad}; slowest {self.seconds:.2f} s, peak memory {self.memory / 2**20:.0f} MiB"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tally:
        return cls(**values | {"failures": tuple(Failure(**failure) for failure in values["failures"])})


class Judge:
    """Runs cases and notes what they must not do; files may change below ``folder`` only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._watching, self._escapes = False, []
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGPROF, self._out_of_time)

    def _out_of_time(self, *_: Any) -> None:
        raise Hang(f"more than {SECONDS} s of processor time")

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event in _ESCAPES:
            self._escapes.append(f"{event} {args[:2]!r}"[:200])
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self._note(event, args[0])
        elif event in _CHANGES:
            self._note(event, args[0])

    def _note(self, event: str, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.realpath(os.fsdecode(path))
        if not place.startswith((str(self.folder), "/dev/")) and "__pycache__" not in place:
            self._escapes.append(f"{event} {place}"[:200])

    @contextmanager
    def limits(self) -> Iterator[None]:
        self._escapes.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def verdict(self, case: Callable[[], int]) -> tuple[str, str] | None:
        """(what, where) of a case that failed; None for exit codes 0 and 3, and for 2 with one line that says why."""
        from simba_lab.errors import InputError

        error, output, replaced = io.StringIO(), _stream(), (sys.stdout, sys.stderr, sys.stdin)
        sys.stdout, sys.stderr, sys.stdin = output, error, _stream()
        code: Any = None
        try:
            with self.limits():
                try:
                    code = case()
                except SystemExit as stop:
                    code = stop.code or 0
        except InputError as refused:
            code, error = refused.exit_code, io.StringIO(f"{' '.join(str(refused).split())}\n")
        except BaseException as bug:
            return f"{type(bug).__name__}: {' '.join(str(bug).split())[:150]}", _frames(bug)
        finally:
            sys.stdout, sys.stderr, sys.stdin = replaced
        return self._judged(code, error.getvalue())

    def _judged(self, code: Any, message: str) -> tuple[str, str] | None:
        if self._escapes:
            return f"escape: {self._escapes[0]}", ""
        if code not in (0, 2, 3) or "Traceback" in message:
            return f"exit code {code!r}", message[-300:]
        if code == 2 and not re.fullmatch(r"[^\n]+\n", message):
            return f"{message.count(chr(10))} lines for exit code 2", message[:300]
        return None


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")


def _frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "simba_lab" in frame.filename and "tests" not in frame.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*frames[-1:], *ours[::-1][:3]])


def run_here(name: str, seed: int, first: int, count: int, seeds: Path, work: Path) -> Tally:
    """Cases of one target in this process."""
    from fuzz_targets import TARGETS

    target, judge, failures, slowest = TARGETS[name](seeds), Judge(work), [], 0.0
    for number in range(first, first + count):
        (work.parent / f"{work.name}.current").write_text(str(number))
        shutil.rmtree(work, ignore_errors=True)
        folder = work / "inner" / "case"
        folder.mkdir(parents=True)
        os.chdir(folder)
        case = target(random.Random(f"{name}/{seed}/{number}"), folder)
        if number == first:
            _limit_memory()
        began = time.process_time()
        verdict = judge.verdict(case)
        slowest = max(slowest, time.process_time() - began)
        if verdict:
            failures.append(Failure(name, number, *verdict))
    return Tally(count, slowest, peak_memory(), tuple(failures))


def peak_memory() -> int:
    """Bytes that this process has held at most. What ``getrusage`` says begins with the peak of whoever started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run_apart(name: str, seed: int, first: int, count: int, seeds: Path, work: Path) -> Tally:
    """The same in a process with limits; where that dies, the case in which it did has failed and the rest go on."""
    done, end = Tally(0), first + count
    while first < end:
        command = [sys.executable, __file__, name, str(seed), str(first), str(end - first), str(seeds), str(work)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        limit = WALL_SECONDS + SECONDS * (end - first)
        try:
            child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit)
            said = child.stdout.strip().splitlines()
            ended = "" if child.returncode == 0 and said else f"process died with {child.returncode}"
            where = child.stderr[-300:]
        except subprocess.TimeoutExpired:
            ended, where = "no end", ""
        if not ended:
            return done + Tally.from_dict(json.loads(said[-1]))
        number = int((work.parent / f"{work.name}.current").read_text())
        done += Tally(number + 1 - first, failures=(Failure(name, number, ended, where),))
        first = number + 1
    return done


def main(arguments: Sequence[str]) -> None:
    name, seed, first, count, seeds, work = arguments
    print(json.dumps(run_here(name, int(seed), int(first), int(count), Path(seeds), Path(work)).to_dict()))


if __name__ == "__main__":
    main(sys.argv[1:])
