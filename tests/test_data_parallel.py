"""Two processes of Lightning's own ``ddp``, from a YAML file, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

from simba_lab.data.loading import evaluation_loader, training_loader
from simba_lab.errors import InputError

PRUNING = {"n_context": 32, "schedule": "linear", "mean_keep": 0.6}
EXACT = ("step", "tokens", "training_flops", "training_flops_by_op", "parameters")


def fit(folder: Path, text: Path, processes: int) -> str:
    """Trains six steps on eight windows each in ``folder``; what the run printed."""
    settings: dict[str, Any] = {
        "data.init_args.source": str(text), "data.init_args.cache_dir": str(text.parent / "cache"),
        "data.init_args.tokenizer": "bytes", "data.init_args.length": 48,
        "data.init_args.batch_size": 8 // processes, "data.init_args.validation_windows": 5,
        "data.init_args.test_windows": 7, "model.model.d_model": 12, "model.model.n_layer": 2,
        "model.pruning": PRUNING, "trainer.default_root_dir": str(folder),
        "trainer.gradient_clip_val": 0.5,
    }  # fmt: skip
    if processes > 1:
        settings |= {"trainer.devices": processes, "trainer.strategy": "ddp"}
    config = tiny.write_yaml(folder / "experiment.yaml", tiny.EXPERIMENT, settings)
    done = subprocess.run(
        [sys.executable, "-m", "simba_lab", "fit", "--config", str(config)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_global_batch(tmp_path: Path) -> None:
    text = tiny.write_corpus(tmp_path / "text.jsonl", documents=20)
    fit(tmp_path / "one", text, 1)
    printed = fit(tmp_path / "two", text, 2)
    assert printed.count("run folder:") == 1
    for key in ("train/loss", "val/loss", "test/loss", "test/accuracy", "test/bits_per_byte"):
        ours, alone = numbers(tmp_path / "two", key), numbers(tmp_path / "one", key)
        assert len(ours) == len(alone) > 0
        np.testing.assert_allclose(ours, alone, rtol=2e-5, atol=2e-6, err_msg=key)
    weights, single = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in single.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    ours, alone = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("two", "one"))
    assert {key: ours[key] for key in EXACT} == {key: alone[key] for key in EXACT}
    assert (ours["processes"], alone["processes"]) == (2, 1)


def items(loader: Any) -> list[int]:
    return [int(value) for (batch,) in loader for value in batch]


@pytest.mark.parametrize(("count", "processes", "batch_size"), [(30, 2, 4), (31, 3, 2), (17, 4, 4)])
def test_processes_share_an_epoch_without_overlap_and_the_global_batches_are_those_of_one(
    count: int, processes: int, batch_size: int
) -> None:
    dataset = TensorDataset(torch.arange(count))
    shares = [items(training_loader(dataset, batch_size, 3, 0, processes, rank)) for rank in range(processes)]
    together = sorted(sum(shares, []))
    assert len(set(together)) == len(together) == processes * len(shares[0])
    alone = items(training_loader(dataset, batch_size * processes, 3))
    assert len(alone) == len(together)
    for start in range(0, len(shares[0]), batch_size):
        ours = {item for share in shares for item in share[start : start + batch_size]}
        assert ours == set(alone[start * processes : (start + batch_size) * processes])


@pytest.mark.parametrize(("count", "processes", "wanted"), [(10, 3, None), (7, 2, 5), (4, 4, None)])
def test_held_out_items_are_measured_once_each(count: int, processes: int, wanted: int | None) -> None:
    dataset = TensorDataset(torch.arange(count))
    shares = [items(evaluation_loader(dataset, 2, wanted, 0, processes, rank)) for rank in range(processes)]
    assert sorted(sum(shares, [])) == items(evaluation_loader(dataset, 2, wanted))
    assert all(shares)


def test_fewer_held_out_items_than_processes_is_a_mistake() -> None:
    with pytest.raises(InputError, match="4 processes share 3 held-out examples"):
        evaluation_loader(TensorDataset(torch.arange(3)), 2, None, 0, 4, 1)
