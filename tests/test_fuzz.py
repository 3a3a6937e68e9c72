"""Everything we parse, spoilt: in `make test` a few hundred cases, in `make soak` more than twenty thousand, and more
that atheris grows along the branches of the parsers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from fuzz_guided import PARSERS, run_guided
from fuzz_targets import TARGETS, make_seeds
from fuzzing import SECONDS, Failure, Judge, Tally, peak_memory, run_apart, run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import Counted, counting, summary

from simba_lab.checkpoint.spec import read_spec
from simba_lab.errors import InputError
from simba_lab.evaluate.arms import parse_arm
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import CRITERIA, PruningPlan, build_schedule
from simba_lab.sweep import SweepConfig
from simba_lab.sweep.config import parse_sweep

# Cheap ones more often: seconds per case differ by a factor of a hundred.
SOAK = {
    "answers": 1500, "arguments": 2000, "arm": 2000, "bench_results": 2000, "benchmark_results": 1000,
    "documents": 1500, "experiment": 1000, "lightning_checkpoint": 1500, "model_spec": 1500, "results": 500,
    "run_record": 1000, "safetensors": 1500, "shard_index": 1500, "state_spaces_config": 1500, "sweep": 1500,
    "tokenizer": 800, "transformers_config": 1500,
}  # fmt: skip
SHORT = 200
AT_ONCE = 500
MADE_UP, MADE_UP_IN_SOAK = 60, 1500
GUIDED_RUNS = 20_000


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeds(tiny.lab(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("fuzz") / "seeds")


class Book:
    """Remembers what passed until a source changes, so that a soak that was interrupted goes on where it was."""

    def __init__(self, cache: pytest.Cache) -> None:
        root, total = Path(__file__).parents[1], hashlib.sha256()
        for path in sorted([*root.glob("simba_lab/**/*.py"), *root.glob("tests/fuzz*.py")]):
            total.update(path.read_bytes())
        self._cache, self._prefix = cache, f"fuzz/{total.hexdigest()[:16]}"

    def run(self, name: str, cases: Callable[[], Tally]) -> Tally:
        """What was run, now or before; failures are not remembered."""
        if remembered := self._cache.get(f"{self._prefix}/{name}", None):
            return Tally.from_dict(remembered)
        tally = cases()
        if not tally.failures:
            self._cache.set(f"{self._prefix}/{name}", tally.to_dict())
        return tally


@pytest.fixture(scope="module")
def book(request: pytest.FixtureRequest) -> Book:
    return Book(request.config.cache)


def told(tally: Tally) -> str:
    return "\n".join(f"{f.target} {f.number}: {f.what} [{f.where}]" for f in tally.failures[:20])


def test_every_target_has_its_share_of_the_soak() -> None:
    assert SOAK.keys() == TARGETS.keys() - {"mixed"} and sum(SOAK.values()) >= 20_000


def test_spoilt_files_end_in_one_line(seeds: Path, tmp_path: Path) -> None:
    """Under the limits, in a process of their own."""
    tally = run_apart("mixed", 0, 0, SHORT, seeds, tmp_path / "mixed")
    assert tally.cases == SHORT and not tally.failures, told(tally)
    assert 0 < tally.seconds < SECONDS and 1 << 26 < tally.memory < 1 << 31


@pytest.mark.soak
@pytest.mark.parametrize("name", SOAK)
def test_soak(seeds: Path, tmp_path: Path, name: str, counted: Counted, book: Book) -> None:
    def part(first: int) -> Tally:
        return run_apart(name, 0, first, AT_ONCE, seeds, tmp_path / str(first))

    starts = range(0, SOAK[name], AT_ONCE)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        tally = sum(pool.map(lambda first: book.run(f"{name}-{first}", lambda: part(first)), starts), Tally(0))
    counted("fuzz, spoilt", tally)
    print(f"\nfuzz, spoilt {name}: {tally}", told(tally), flush=True)
    assert tally.cases >= SOAK[name] and not tally.failures, told(tally)


@pytest.mark.soak
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install -e '.[fuzz]' (Linux)")
@pytest.mark.parametrize("name", PARSERS)
def test_guided_soak(seeds: Path, tmp_path: Path, name: str, counted: Counted, book: Book) -> None:
    """Inputs that atheris grows along the branches of a parser that they reach."""
    tally = book.run(f"guided-{name}", lambda: run_guided(name, GUIDED_RUNS, seeds, tmp_path))
    counted("fuzz, guided by coverage", tally)
    print(f"\nfuzz, guided {name}: {tally}", flush=True)
    assert tally.cases >= GUIDED_RUNS


def judged(folder: Path, case: object) -> str | None:
    folder.mkdir(exist_ok=True)
    verdict = Judge(folder).verdict(case)  # type: ignore[arg-type]
    return verdict and verdict[0]


def test_the_judge_sees_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a soak without failures would mean nothing."""
    inside, outside = tmp_path / "in", tmp_path / "outside"
    monkeypatch.setattr("fuzzing.SECONDS", 0.2)

    def refuse() -> int:
        raise InputError("one line")

    def endless() -> int:
        while True:
            pass

    assert judged(inside, lambda: 0) is None and judged(inside, refuse) is None
    assert judged(inside, lambda: (inside / "a").write_text("x") and 0) is None
    assert judged(inside, lambda: outside.write_text("x") and 0).startswith("escape: open")
    assert judged(inside, lambda: os.system("true")).startswith("escape: os.system")
    assert judged(inside, lambda: 1 // 0).startswith("ZeroDivisionError")
    assert judged(inside, lambda: 1) == "exit code 1"
    assert judged(inside, lambda: print("a\nb", file=__import__("sys").stderr) or 2) == "2 lines for exit code 2"
    assert judged(inside, endless).startswith("Hang")


def test_a_tally_names_what_went_wrong() -> None:
    said = ["escape: open /etc", "Hang: more than 5.0 s", "no end", "MemoryError: ", "KeyError: 1", "exit code 1"]
    failures = tuple(Failure("sweep", number, what, "") for number, what in enumerate(said))
    tally = Tally(1500, 0.25, 3 << 20, failures[:2]) + Tally(2, 0.5, 1 << 20, failures[2:])
    assert str(tally) == (
        "1,502 cases: 2 tracebacks, 2 hangs, 1 out of memory, 1 files outside; slowest 0.50 s, peak memory 3 MiB"
    )
    assert Tally.from_dict(json.loads(json.dumps(tally.to_dict()))) == tally


def test_a_soak_ends_with_a_line_for_each_part() -> None:
    config = SimpleNamespace(stash=pytest.Stash())
    assert summary(config) == []
    counted = counting(config)
    counted("a fit", Counter(commands=2))
    counted("fuzz", Tally(3, 0.5, 1 << 20))
    counted("a fit", Counter(commands=1, workers=4))
    counted("fuzz", Tally(4, 0.25, 2 << 20))
    assert summary(config) == ["a fit: 7 kills: 3 of commands, 4 of workers", f"fuzz: {Tally(7, 0.5, 2 << 20)}"]


def test_memory_is_limited(tmp_path: Path, seeds: Path) -> None:
    """In a process of its own, since a limit cannot be taken back."""
    import subprocess
    import sys

    code = "import fuzzing, numpy; fuzzing._limit_memory(); numpy.ones(1 << 28)"
    child = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "MemoryError" in child.stderr
    assert run_here.__module__ == "fuzzing"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*ModelConfig.__dataclass_fields__, "", "x"])
specs = (
    st.fixed_dictionaries({"class_path": st.sampled_from([*CRITERIA.names(), "linear", "knots", "a.b"]) | plain})
    | plain
)
sound = {"d_model": 8, "n_layer": 2, "vocab_size": 9}
sweep_keys = st.sampled_from([*SweepConfig.__dataclass_fields__, "", "x"])


def spec_is_read_or_refused(made: tuple[dict, Any, Any, Any]) -> None:
    model, criterion, schedule, share = made
    pruning = {"criterion": criterion, "schedule": schedule, "protect_recent": share}
    for spec in (
        {"format": 1, "model": sound | model, "pruning": None},
        {"format": 1, "model": sound, "pruning": pruning},
    ):
        try:
            read_spec(spec, "file")
        except InputError as refused:
            assert str(refused).startswith("file: ")


def arm_is_built_or_refused(made: tuple[Any, Any, str]) -> None:
    criterion, schedule, text = made
    model = LanguageModel(ModelConfig(8, 2, 9), backend="reference")
    for build in (
        lambda: PruningPlan.build(2, criterion, schedule), lambda: build_schedule(schedule).counts(2, 9),
        lambda: parse_arm(text, model), lambda: parse_arm(f"linear:norm@{text}", model),
    ):  # fmt: skip
        try:
            build()
        except InputError as refused:
            assert str(refused)


def sweep_is_read_or_refused(made: dict[str, Any]) -> None:
    about = {"experiment": "base.yaml", "budget": {"flops": 7}, "arms": [{"kind": "dense"}]}
    try:
        assert parse_sweep(about | made, "file").arms
    except InputError as refused:
        assert str(refused)


PROPERTIES = {
    "spec": (spec_is_read_or_refused, st.tuples(st.dictionaries(fields, plain, max_size=6), specs, specs, plain)),
    "arm": (arm_is_built_or_refused, st.tuples(plain, plain, st.text(max_size=30))),
    "sweep": (sweep_is_read_or_refused, st.dictionaries(sweep_keys, plain, max_size=5)),
}


def explored(name: str, examples: int) -> Tally:
    """Holds a property against what hypothesis makes up, in this process."""
    check, made_up = PROPERTIES[name]
    seconds: list[float] = []

    @settings(
        max_examples=examples, deadline=5000, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(made_up)
    def judge(made: Any) -> None:
        began = time.process_time()
        check(made)
        seconds.append(time.process_time() - began)

    judge()
    return Tally(len(seconds), max(seconds), peak_memory())


@pytest.mark.parametrize("name", PROPERTIES)
def test_what_hypothesis_makes_up_is_read_or_refused(name: str) -> None:
    assert explored(name, MADE_UP).cases >= MADE_UP


@pytest.mark.soak
@pytest.mark.parametrize("name", PROPERTIES)
def test_made_up_soak(name: str, counted: Counted) -> None:
    tally = explored(name, MADE_UP_IN_SOAK)
    counted("fuzz, made up by hypothesis", tally)
    assert tally.cases >= MADE_UP_IN_SOAK
