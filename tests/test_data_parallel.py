"""Two processes of Lightning's own ``ddp``, from a YAML file, against one process with the same global batch."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from simba_lab.data.loading import evaluation_loader, training_loader
from simba_lab.errors import InputError
from simba_lab.training import exchange
from simba_lab.training.sharding import check_strategy

PRUNING = {"n_context": 32, "schedule": "linear", "mean_keep": 0.6}
EXACT = ("step", "tokens", "training_flops", "training_flops_by_op", "parameters")


def settings(folder: Path, text: Path, pruning: Any = PRUNING, **changes: Any) -> dict[str, Any]:
    """Eight windows a step, until step six."""
    return {
        "data.init_args.source": str(text), "data.init_args.cache_dir": str(text.parent / "cache"),
        "data.init_args.tokenizer": "bytes", "data.init_args.length": 48, "data.init_args.batch_size": 8,
        "data.init_args.validation_windows": 5, "data.init_args.test_windows": 7, "model.model.d_model": 12,
        "model.model.n_layer": 2, "model.backend": "reference", "model.pruning": pruning,
        "trainer.default_root_dir": str(folder), "trainer.gradient_clip_val": 0.5,
        "model.final_lr_share": 1.0,  # or the step at which a run ends would decide the rate of every step before
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip


def command(folder: Path, given: dict[str, Any]) -> list[str]:
    """A fit in ``folder`` that goes on from where it is."""
    config = tiny.write_yaml(folder / "experiment.yaml", tiny.EXPERIMENT, given)
    return ["fit", "--config", str(config), "--ckpt_path", "last"]


def alone(folder: Path, text: Path, until: int = 6, pruning: Any = PRUNING) -> Path:
    """A fit by one process, this one."""
    assert tiny.simba_lab(*command(folder, settings(folder, text, pruning, trainer__max_steps=until))) == 0
    return folder


def together(
    folder: Path, text: Path, until: int = 6, strategy: str = "ddp", pruning: Any = PRUNING, script: str | None = None
) -> Path:
    """A fit by two processes, each with half of the windows; ``script`` stands in for ``simba-lab``."""
    given = settings(folder, text, pruning, trainer__max_steps=until, data__init_args__batch_size=4)
    given |= {"trainer.devices": 2, "trainer.strategy": strategy}
    script = "sharded_on_cpu.py" if strategy == "fsdp" else script
    program = ["-m", "simba_lab"] if script is None else [str(Path(__file__).with_name(script))]
    done = subprocess.run(
        [sys.executable, *program, *command(folder, given)],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == 1
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("text") / "text.jsonl", documents=20)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of one process, never interrupted."""
    return alone(tmp_path_factory.mktemp("alone") / "one", text)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The same run by two processes."""
    return together(tmp_path_factory.mktemp("together") / "two", text)


def numbers(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def assert_same_run(folder: Path, other: Path) -> None:
    """Equal but for the rounding of sums that are split among processes."""
    for key in ("train/loss", "val/loss", "test/loss", "test/accuracy", "test/bits_per_byte"):
        ours, theirs = numbers(folder, key), numbers(other, key)
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6, err_msg=key)
    weights, single = (load_file(place / "model.safetensors") for place in (folder, other))
    assert weights.keys() == single.keys()
    for name, weight in single.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    ours, theirs = (json.loads((place / "run.json").read_text()) for place in (folder, other))
    assert {key: ours[key] for key in EXACT} == {key: theirs[key] for key in EXACT}


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_the_same_global_batch(one: Path, two: Path) -> None:
    assert_same_run(two, one)
    assert [json.loads((run / "run.json").read_text())["processes"] for run in (two, one)] == [2, 1]


@pytest.mark.slow
def test_exchanging_gradients_after_the_backward_pass_changes_nothing(tmp_path: Path, two: Path, text: Path) -> None:
    """As replayed steps do; the weights of plain ``ddp`` to the bit, since two numbers add up the same either way."""
    replayed = together(tmp_path / "replayed", text, script="replayed_on_cpu.py")
    weights, plain = (load_file(run / "model.safetensors") for run in (replayed, two))
    assert all(torch.equal(weights[name], weight) for name, weight in plain.items())
    assert numbers(replayed, "train/loss") == numbers(two, "train/loss")
    assert_same_run(replayed, two)


@pytest.mark.parametrize(("elements", "sizes"), [(6, [[4, 1], [5], [1], [9], [2]]), (100, [[4, 1, 5], [1, 9, 2]])])
def test_gradients_go_in_buckets_of_one_dtype(elements: int, sizes: list[list[int]]) -> None:
    narrow = [torch.ones(n, dtype=torch.bfloat16) for n in (4, 1, 5)]
    wide = [torch.ones(n) for n in (1, 9, 2)]
    found = [[t.numel() for t in bucket] for bucket in exchange.buckets([*narrow, *wide], elements)]
    assert found == sizes


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapping(kind: type[DDPStrategy] = DDPStrategy, **options: Any) -> DDPStrategy:
    strategy = kind(accelerator=None)
    strategy.model = DistributedDataParallel(torch.nn.Linear(2, 1), **options)
    return strategy


def test_gradients_are_exchanged_afterwards_only_where_that_is_the_same(group: None) -> None:
    assert exchange.refusal(wrapping()) is None and exchange.refusal(SingleDeviceStrategy()) is None
    for option in ("find_unused_parameters", "static_graph"):
        assert "look at the backward pass" in exchange.refusal(wrapping(**{option: True}))
    hooked = wrapping()
    hooked.model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    assert exchange.refusal(hooked) == "a communication hook exchanges gradients"
    assert "Own exchanges gradients during" in exchange.refusal(wrapping(type("Own", (DDPStrategy,), {})))


def test_an_exchange_gives_back_what_it_took(group: None) -> None:
    wrapped = wrapping().model
    taken = exchange.Exchange(wrapped)
    assert not wrapped.require_backward_grad_sync
    wrapped(torch.ones(3, 2)).sum().backward()
    taken.average()
    assert wrapped.module.weight.grad.tolist() == [[3.0, 3.0]] and wrapped.module.bias.grad.tolist() == [3.0]
    taken.close()
    assert wrapped.require_backward_grad_sync


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(
    tmp_path: Path, one: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = together(tmp_path / "run", text, until=2)
    halved = settings(folder, text, data__init_args__batch_size=4)
    line = tiny.mistake(capsys, *command(folder, halved))
    assert "8 examples at once, data.batch_size 4 in 1 process makes 4; to resume exactly, set data.batch_size" in line
    assert_same_run(alone(folder, text), one)


@pytest.mark.slow
def test_two_processes_with_divided_weights_go_on_where_one_was(tmp_path: Path, one: Path, text: Path) -> None:
    """The same optimiser steps too: clipping by the norm of all gradients, weight decay on matrices alone."""
    folder = alone(tmp_path / "run", text, until=2)
    assert_same_run(together(folder, text, strategy="fsdp"), one)


@pytest.mark.slow
def test_one_process_goes_on_where_divided_layers_were(tmp_path: Path, text: Path) -> None:
    """A dense model, each layer of which is divided by itself."""
    dense = alone(tmp_path / "one", text, pruning=None)
    folder = together(tmp_path / "run", text, until=2, strategy="fsdp", pruning=None)
    assert_same_run(alone(folder, text, pruning=None), dense)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("pruning", [None, PRUNING])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_gpus_train_as_one(tmp_path: Path, text: Path, strategy: str, pruning: Any) -> None:
    """With divided weights; or with whole ones and replayed steps."""
    graphs = "off" if strategy == "fsdp" else "auto"
    on_gpu = {"trainer.accelerator": "gpu", "model.backend": "auto", "model.cuda_graphs": graphs}
    losses = {}
    for name, own in (("one", {}), ("two", {"trainer.devices": 2, "trainer.strategy": strategy})):
        given = settings(tmp_path / name, text, pruning, data__init_args__batch_size=4 if own else 8) | on_gpu | own
        fit = [sys.executable, "-m", "simba_lab", *command(tmp_path / name, given)]
        subprocess.run(fit, check=True, timeout=600)
        losses[name] = numbers(tmp_path / name, "train/loss") + numbers(tmp_path / name, "test/loss")
    np.testing.assert_allclose(losses["two"], losses["one"], rtol=1e-3)


def test_weights_are_divided_among_gpus_only(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings(tmp_path / "run", text) | {"trainer.strategy": "fsdp"}
    line = tiny.mistake(capsys, *command(tmp_path / "run", given))
    assert "trainer.strategy: fsdp divides a model among GPUs, and there are none; give auto or ddp" in line
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(InputError, match="give the name fsdp"):
        check_strategy(FSDPStrategy())


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


def taken(loaders: list[Any], batches: int) -> list[set[int]]:
    """The items of each of the next global batches, of all processes together."""
    passes = [itertools.islice(iter(loader), batches) for loader in loaders]
    return [{int(item) for (batch,) in together for item in batch} for together in zip(*passes, strict=True)]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("done", [0, 2, 3, 5])  # an epoch of 41 has three global batches of 12
def test_another_number_of_processes_goes_on_where_the_others_were(before: int, after: int, done: int) -> None:
    dataset = TensorDataset(torch.arange(41))

    def loaders(processes: int) -> list[Any]:
        return [training_loader(dataset, 12 // processes, 3, 0, processes, rank) for rank in range(processes)]

    first, then, alone = loaders(before), loaders(after), loaders(1)
    ran = sum((taken(first, min(3, done - start)) for start in range(0, done, 3)), [])
    for loader in then:
        loader.load_state_dict(first[0].state_dict())
    whole = taken(alone, 3) + taken(alone, 3) + taken(alone, 3)
    assert ran + taken(then, 3) == whole[: done + 3]


def test_another_global_batch_is_a_mistake() -> None:
    dataset = TensorDataset(torch.arange(41))
    saved = training_loader(dataset, 6, 3, 0, 2, 0).state_dict()
    with pytest.raises(InputError, match=r"on 12 examples at once, data.batch_size 6 in 1 process makes 6; .* to 12$"):
        training_loader(dataset, 6, 3).load_state_dict(saved)
