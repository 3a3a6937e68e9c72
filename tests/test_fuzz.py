"""Everything we parse, spoilt: in `make test` a few hundred cases, in `make soak` more than twenty thousand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from fuzz_targets import TARGETS, make_seeds
from fuzzing import Failure, Judge, run_apart, run_here
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simba_lab.checkpoint.spec import read_spec
from simba_lab.errors import InputError
from simba_lab.evaluate.arms import parse_arm
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import CRITERIA, PruningPlan, build_schedule

# Cheap ones more often: seconds per case differ by a factor of a hundred.
SOAK = {
    "arguments": 2000, "arm": 2000, "bench_results": 2000, "documents": 1500, "experiment": 1000,
    "lightning_checkpoint": 1500, "model_spec": 1500, "results": 500, "run_record": 1200, "safetensors": 1500,
    "shard_index": 1500, "state_spaces_config": 1500, "sweep": 1500, "tokenizer": 800, "transformers_config": 1500,
}  # fmt: skip
SHORT = 200
AT_ONCE = 100


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeds(tiny.lab(tmp_path_factory.getbasetemp()), tmp_path_factory.mktemp("fuzz") / "seeds")


def told(failures: Sequence[Failure]) -> str:
    return "\n".join(f"{f.target} {f.number}: {f.what} [{f.where}]" for f in failures[:20])


def test_every_target_has_its_share_of_the_soak() -> None:
    assert SOAK.keys() == TARGETS.keys() - {"mixed"} and sum(SOAK.values()) >= 20_000


def test_spoilt_files_end_in_one_line(seeds: Path, tmp_path: Path) -> None:
    """Under the limits, in a process of their own."""
    ran, failures = run_apart("mixed", 0, 0, SHORT, seeds, tmp_path / "mixed")
    assert ran == SHORT and not failures, told(failures)


@pytest.mark.soak
@pytest.mark.parametrize("name", SOAK)
def test_soak(seeds: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    starts = range(0, SOAK[name], AT_ONCE)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        parts = list(pool.map(lambda n: run_apart(name, 0, n, AT_ONCE, seeds, tmp_path / str(n)), starts))
    ran, failures = sum(ran for ran, _ in parts), [failure for _, found in parts for failure in found]
    with capsys.disabled():
        print(f"\nfuzz {name}: {ran} cases, {len(failures)} failures")
    assert ran >= SOAK[name] and not failures, told(failures)


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
settle = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@settle
@given(st.dictionaries(fields, plain, max_size=6), specs, specs, plain)
def test_a_spec_is_read_or_refused(model: dict, criterion: object, schedule: object, share: object) -> None:
    sound = {"d_model": 8, "n_layer": 2, "vocab_size": 9}
    pruning = {"criterion": criterion, "schedule": schedule, "protect_recent": share}
    for spec in (
        {"format": 1, "model": sound | model, "pruning": None},
        {"format": 1, "model": sound, "pruning": pruning},
    ):
        try:
            read_spec(spec, "file")
        except InputError as refused:
            assert str(refused).startswith("file: ")


@settle
@given(plain, plain, st.text(max_size=30))
def test_an_arm_is_built_or_refused(criterion: object, schedule: object, text: str) -> None:
    model = LanguageModel(ModelConfig(8, 2, 9), backend="reference")
    for build in (
        lambda: PruningPlan.build(2, criterion, schedule), lambda: build_schedule(schedule).counts(2, 9),
        lambda: parse_arm(text, model), lambda: parse_arm(f"linear:norm@{text}", model),
    ):  # fmt: skip
        try:
            build()
        except InputError as refused:
            assert str(refused)
