"""The CPU bench on a small shape: what a row means, and that a wrong kernel yields no number."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simba_lab.bench import cpu, peers
from simba_lab.bench.cpu import Plan, compare
from simba_lab.bench.peers import IMPLEMENTATIONS, Shape
from simba_lab.cli.main import main
from simba_lab.errors import InputError

SMALL = Shape(d_model=24, n_layer=2, d_state=3, vocab_size=40, batch=3, length=29)


def test_bench_writes_a_row_per_implementation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [text for key, value in dataclasses.asdict(SMALL).items() for text in (peers.option(key), str(value))]
    out = tmp_path / "bench.json"
    assert main(["bench", "cpu", *sides, "--threads", "1", "--skip", "transformers", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["implementation"]: row for row in result["rows"]}
    assert list(rows) == ["simba_lab", "mambapy"]
    assert result["shape"] == dataclasses.asdict(SMALL) and result["threads"] == 1
    expected = rows["mambapy"]["seconds_per_step"] / rows["simba_lab"]["seconds_per_step"]
    assert result["speedup_over_mambapy"] == pytest.approx(expected)
    for row in rows.values():
        assert 0 < row["seconds_min"] <= row["seconds_per_step"] <= row["seconds_max"]
        assert row["tokens_per_second"] == pytest.approx(3 * 29 / row["seconds_per_step"])
        assert row["loss"] == pytest.approx(math.log(40), abs=0.3)
        assert row["peak_rss_bytes"] > 50e6 and 3 <= row["repeats"] <= 3 * peers.TURN_STEPS
    # the same architecture: the same number of weights
    assert rows["simba_lab"]["parameters"] == rows["mambapy"]["parameters"]
    assert "times as fast as mambapy" in capsys.readouterr().out


def test_implementations_agree_on_what_a_model_is() -> None:
    counts, losses = {}, {}
    for name, implementation in IMPLEMENTATIONS.items():
        pytest.importorskip(implementation.distribution.replace("-", "_"))
        contestant = peers.Contestant(name, SMALL, threads=torch.get_num_threads(), seed=0)
        contestant.turn()
        row = contestant.row()
        counts[name], losses[name] = row["parameters"], row["loss"]
    assert len(set(counts.values())) == 1, counts
    # our two backends share weights and tokens, so they must share the loss
    assert losses["simba_lab"] == pytest.approx(losses["simba_lab reference"], rel=1e-6)


def test_a_wrong_kernel_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from simba_lab.kernels import cpu as numba_ops

    scan = numba_ops.selective_scan

    def slightly_wrong(*args: object, **options: object) -> object:
        out, *rest = scan(*args, **options)
        return (out * 1.001, *rest)

    monkeypatch.setattr(numba_ops, "selective_scan", slightly_wrong)
    monkeypatch.setattr(cpu, "_rows", lambda *_: pytest.fail("timed after a failed check"))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        compare(Plan(shape=SMALL))


def test_the_check_passes_and_sees_nan() -> None:
    assert 0 < cpu.check_correctness() <= cpu.TOLERANCE
    ones = torch.ones(3)
    assert cpu._relative_difference(ones * float("nan"), ones) == math.inf


def test_a_peer_that_is_not_installed_gets_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", peers.Implementation("no-such-package", peers.mambapy))
    (row,) = cpu._rows(Plan(shape=SMALL, skip=("simba_lab", "mambapy", "transformers")), 1, lambda name: None)
    assert row == {"implementation": "absent", "skipped": "no-such-package is not installed"}
    assert cpu.speedup([{"implementation": "simba_lab", "seconds_per_step": 1.0}, row]) is None


def test_a_process_that_breaks_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", peers.Implementation("simba-lab", peers.mambapy))
    plan = Plan(shape=SMALL, skip=("simba_lab", "mambapy", "transformers"))
    with pytest.raises(RuntimeError, match="broken failed with exit code 2:\n(.*\n)*.*invalid choice: 'broken'"):
        cpu._rows(plan, 1, lambda name: None)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"shape": Shape(length=0)}, "--length"), ({"repeats": 2}, "--repeats"), ({"threads": 10**6}, "--threads")],
)
def test_wrong_plans_name_the_option(wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Plan(**wrong)


def test_peak_memory_is_the_process_own() -> None:
    block = torch.ones(100_000_000)
    assert peers.peak_rss_bytes() >= 4 * len(block)
    code = "from simba_lab.bench.peers import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # a process that this one starts must not count the block as its own
    assert 5e6 < int(done.stdout) < 2 * len(block)


def test_prefill_bench_compares_seconds_with_flops(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = ["--d-model", "16", "--n-layer", "3", "--vocab-size", "23", "--batch", "1", "--length", "65"]
    path = tmp_path / "prefill.json"
    assert main(["bench", "prefill", *shape, "--repeats", "3", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["fraction"] == pytest.approx(result["speedup"] / result["promised_by_flops"])
    assert 1.1 < result["promised_by_flops"] < 1.8 and result["repeats"] == 12
    assert "FLOPs promise" in capsys.readouterr().out
