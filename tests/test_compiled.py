"""CPU kernels come from the cache alone: the first run's bits are every run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from simba_lab.kernels.cpu import compiled  # noqa: E402 - needs Numba

SCAN = """
import hashlib, torch
from simba_lab.kernels import cpu
from simba_lab.kernels.cpu import scan_forward
draw = torch.Generator().manual_seed(0)
x, dt, z = (torch.randn(2, 37, 40, generator=draw) for _ in range(3))
B, C = (torch.randn(2, 37, 5, generator=draw) for _ in range(2))
out, last = cpu.selective_scan(x, dt, torch.zeros(40), -torch.ones(40, 5), B, C, torch.ones(40), z)
print(hashlib.sha256(out.numpy().tobytes() + last.numpy().tobytes()).hexdigest())
print(sum(scan_forward.forward.stats.cache_misses.values()), sum(scan_forward.forward.stats.cache_hits.values()))
"""


def in_a_process(code: str, cache: Path) -> list[str]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_process_that_finds_no_kernels_computes_what_later_ones_do(tmp_path: Path) -> None:
    first, later = (in_a_process(SCAN, tmp_path) for _ in range(2))
    assert first == later
    assert first[1] == "0 1", "compiled elsewhere, then loaded"


def test_a_change_of_what_kernels_share_is_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from simba_lab.kernels.cpu import norm

    codegen = norm.forward.targetctx.codegen()
    before = norm.forward._cache._index_key((), codegen)
    monkeypatch.setattr(compiled, "_shared_sources", lambda: "changed")
    assert norm.forward._cache._index_key((), codegen) != before


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("writable", [False, True])
def test_types_of_arguments_reach_the_helper_as_they_are(transposed: bool, writable: bool) -> None:
    array = np.zeros((2, 3), np.float32)
    array = array[:, ::2] if transposed else array
    array.flags.writeable = writable
    for value in (array, np.zeros(4, np.int64), np.zeros(2, bool), 3, 2.5, True, np.float32(1)):
        described = json.loads(json.dumps(compiled._described(numba.typeof(value))))
        assert compiled._type(described) == numba.typeof(value)


def unknown_to_the_helper() -> None: ...


def test_a_kernel_that_the_helper_cannot_find_is_named_and_compiled_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @compiled.kernel
    def doubled(x):  # noqa: ANN001, ANN202 - compiled by Numba
        for i in numba.prange(x.size):
            x[i] *= 2

    values = np.arange(3.0)
    with pytest.warns(UserWarning, match="doubled was not compiled by its helper: AttributeError"):
        doubled(values)
    assert values.tolist() == [0, 2, 4]


def test_the_helper_is_started_again_after_its_death() -> None:
    helper = compiled._Helper()
    try:
        for _ in range(2):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                helper.compile(unknown_to_the_helper, ())
            assert len(said) == 1, "it answered"
            helper.process.kill()
            helper.process.wait()
    finally:
        helper.close()
