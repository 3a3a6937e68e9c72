"""Backends made of other packages: why one is unusable, what it lacks, and on a GPU that it equals the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_kernels
import test_mamba2_kernels
import torch
from torch import Tensor

from simba_lab import kernels
from simba_lab.errors import InputError
from simba_lab.kernels import available_backends, backend_names, reference, resolve
from simba_lab.kernels.peers import causal_conv1d, mamba_ssm

PEERS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
# Relative norm of the error.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
OTHER_OPS = ("add_rms_norm", "global_impact", "ssd_impact", "gated_rms_norm", "select_tokens", "cross_entropy")


def conv_inputs(length: int, channels: int, width: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """x is a slice of a wider tensor, as it is behind a projection."""
    generator = torch.Generator().manual_seed(length)
    x, weight, bias, initial = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((2, length, 2 * channels), (channels, width), (channels,), (2, width - 1, channels))
    )
    return {"x": x[..., channels:], "weight": weight, "bias": bias, "initial": initial}


def compare(op: Callable, exact: Callable, given: dict[str, Tensor], tolerance: float) -> None:
    """Outputs, and the gradients of a fixed random functional of the first, against the reference in fp64."""
    results = []
    for function, arguments in ((op, given), (exact, {name: t.double() for name, t in given.items()})):
        leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
        out, last = function(**leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out, last, *torch.autograd.grad((out * weights).sum(), list(leaves.values()))])
    for name, got, truth in zip(("out", "last", *given), *results, strict=True):
        # One token after no state has no gradient of A at all: its error is an absolute one.
        error = float((got.double() - truth).detach().norm() / truth.norm().clamp(min=1e-3))
        assert got.shape == truth.shape and error <= tolerance, f"{name}: {error:.1e}"


def on_gpu(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)
            for name, t in given.items()}  # fmt: skip


# Choosing one


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert available_backends("cuda")[name] == f"the package {PEERS[name]} is not installed"
    with pytest.raises(InputError, match=f"backend: '{name}' cannot run on cuda: the package {PEERS[name]} is not"):
        resolve(name, "cuda")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_needs_a_gpu(name: str) -> None:
    with pytest.raises(InputError, match=f"backend: '{name}' cannot run on cpu: compiles for CUDA devices"):
        resolve(name, "cpu")


@pytest.mark.parametrize("name", PEERS)
def test_a_broken_installation_says_what_broke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = _failure_of(name, "raise ImportError('undefined symbol: _ZN3c10\\nand more')", tmp_path, monkeypatch)
    assert failure == f"the package {PEERS[name]} cannot be imported: ImportError: undefined symbol: _ZN3c10"


def _failure_of(name: str, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The reason against a backend whose package consists of ``code``."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    kernels._import_failure.cache_clear()
    try:
        return available_backends("cuda")[name]
    finally:
        kernels._import_failure.cache_clear()


def test_auto_never_takes_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = {name: (module, lambda device: None) for name, (module, _) in kernels._BACKENDS.items()}
    monkeypatch.setattr(kernels, "_BACKENDS", usable)
    names = backend_names()
    assert set(names[names.index("reference") + 1 :]) == set(PEERS)
    assert resolve("auto", "cpu").name == names[1]


@pytest.mark.parametrize(("name", "own"), [("mamba_ssm", "causal_conv"), ("causal_conv1d", "ssd")])
def test_what_a_peer_lacks_is_ours(name: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from simba_lab.kernels import gpu

    module, _ = kernels._BACKENDS[name]
    monkeypatch.setitem(kernels._BACKENDS, name, (module, lambda device: None))
    backend = resolve(name, "cuda")
    assert all(getattr(backend, op) is getattr(gpu, op) for op in (own, *OTHER_OPS))
    peer = {"mamba_ssm": mamba_ssm.selective_scan, "causal_conv1d": causal_conv1d.causal_conv}[name]
    assert peer in (backend.selective_scan, backend.causal_conv)


# What one cannot do


def test_a_selective_scan_from_a_state_is_refused() -> None:
    with pytest.raises(InputError, match="no initial state; use backend triton"):
        mamba_ssm.selective_scan(**test_kernels.inputs(1, 2, 3, dtype=torch.float32))


def test_dtypes_and_sizes_that_a_peer_has_not_are_refused() -> None:
    with pytest.raises(InputError, match="mamba_ssm scans in fp32"):
        mamba_ssm.ssd(**test_mamba2_kernels.inputs(2))
    with pytest.raises(InputError, match="d_state: the mamba_ssm backend takes at most 256, not 257"):
        mamba_ssm.ssd(**test_mamba2_kernels.inputs(2, 1, 1, 1, 257, dtype=torch.float32))
    with pytest.raises(InputError, match="multiple of 8 channels, not 12"):
        causal_conv1d.causal_conv(**conv_inputs(3, 12))
    with pytest.raises(InputError, match="d_conv: the causal_conv1d backend takes 2, 3 or 4, not 5"):
        causal_conv1d.causal_conv(**conv_inputs(3, 8, width=5))


# Equal outputs and gradients


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("length", [1, 67, 300])
def test_selective_scan_of_mamba_ssm(length: int, dtype: torch.dtype) -> None:
    pytest.importorskip("mamba_ssm")
    given = test_kernels.inputs(2, length, 24, 16, dtype)
    del given["initial"]
    op = resolve("mamba_ssm", "cuda").selective_scan
    compare(op, reference.selective_scan, on_gpu(given), TOLERANCE[dtype])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("length", [1, 67, 300])
@pytest.mark.parametrize("continued", [True, False])
def test_ssd_of_mamba_ssm(length: int, dtype: torch.dtype, continued: bool) -> None:
    pytest.importorskip("mamba_ssm")
    given = test_mamba2_kernels.inputs(length, 8, 64, 2, 128, dtype=dtype)
    if not continued:
        del given["initial"]
    compare(resolve("mamba_ssm", "cuda").ssd, reference.ssd, on_gpu(given), TOLERANCE[dtype])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("length", [1, 2, 67])
def test_convolution_of_causal_conv1d(length: int, dtype: torch.dtype) -> None:
    pytest.importorskip("causal_conv1d")
    given = conv_inputs(length, 24, dtype=dtype)
    compare(resolve("causal_conv1d", "cuda").causal_conv, reference.causal_conv, on_gpu(given), TOLERANCE[dtype])
