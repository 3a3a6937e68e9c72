"""Triton's ops of Mamba-2 against the reference in fp64, on CUDA or else in Triton's interpreter."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_kernels import outputs_and_gradients
from test_mamba2_kernels import PER_TOKEN, impact_of, inputs, norm_gradients, norm_inputs
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import reference, resolve

pytest.importorskip("triton")
from simba_lab.kernels import gpu  # noqa: E402 - it needs triton
from simba_lab.kernels.gpu import gated_norm, norm, ssd_scan, ssd_scores  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative norm of the error: the bounds are 1e-4 in fp32 and 1e-2 in bf16. The interpreter cuts bf16 off
# instead of rounding it.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
# Length, heads, channels per head, groups, states; chunks have 16 tokens in fp32.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 3, 4), (15, 4, 3, 2, 5), (16, 2, 18, 1, 16), (17, 3, 2, 3, 3), (35, 2, 7, 2, 17)]


def on_device(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the device, with the strides they had."""
    if DEVICE == "cpu":
        return arguments
    return {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)
            for name, t in arguments.items()}  # fmt: skip


def arguments(*shape: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    return on_device(inputs(*shape, batch=batch, dtype=dtype))


def doubles(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in given.items()}


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(given: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and all gradients against the reference in fp64; dtypes against the reference's own."""
    got = outputs_and_gradients(gpu.ssd, given)
    same = outputs_and_gradients(reference.ssd, given)
    for name, exact in outputs_and_gradients(reference.ssd, doubles(given)).items():
        assert got[name].dtype == same[name].dtype and got[name].shape == exact.shape, name
        assert error(got[name], exact) <= tolerance, f"{name}: {error(got[name], exact):.1e}"


# The scan


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape: tuple[int, ...], nan_memory: None) -> None:
    compare(arguments(*shape), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, nan_memory: None) -> None:
    compare(arguments(70, 2, 5, 2, 9, dtype=dtype, batch=1), TOLERANCE[dtype])


@pytest.mark.parametrize("parts", [2, 3])
def test_segments_of_a_sequence_do_not_show(parts: int, nan_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_scan, "segments", lambda length, heads: parts)
    given = arguments(16 * 5 + 3, 1, 5, 1, 3, batch=1)
    compare(given, TOLERANCE[torch.float32])
    del given["initial"]
    out, final = gpu.ssd(**given)
    truth = reference.ssd(**doubles(given))
    assert error(out, truth[0]) <= 1e-6 and error(final, truth[1]) <= 1e-6


def test_many_heads_of_a_group_share_the_gradients_of_its_vectors(
    nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd_scan, "HEADS_TOGETHER", 2)
    compare(arguments(5, 6, 2, 2, 3, batch=1), TOLERANCE[torch.float32])


def test_wide_heads_and_states_take_several_tiles(nan_memory: None) -> None:
    compare(arguments(33, 2, 70, 1, 70, batch=1), TOLERANCE[torch.float32])


def test_only_long_sequences_are_cut_whatever_the_batch() -> None:
    assert [ssd_scan.segments(length, 80) for length in (1, 2048, 4095, 4096, 16384)] == [1, 1, 1, 2, 3]
    assert ssd_scan.segments(16384, 24) == 8 and ssd_scan.segments(16384, 1000) == 1


def test_it_continues_from_a_state() -> None:
    given = arguments(41, 2, 3, 1, 2)
    whole, final = gpu.ssd(**given)
    state, parts = given["initial"], []
    for tokens in (slice(0, 1), slice(1, 33), slice(33, 41)):
        part = {name: t[:, tokens] if name in PER_TOKEN else t for name, t in given.items()}
        out, state = gpu.ssd(**part | {"initial": state})
        parts.append(out)
    assert error(torch.cat(parts, 1), whole.double()) <= 1e-6 and error(state, final.double()) <= 1e-6


def test_without_a_state_it_starts_from_zero() -> None:
    given = arguments(9)
    zero = given | {"initial": torch.zeros_like(given["initial"])}
    del given["initial"]
    for mine, theirs in itertools.zip_longest(gpu.ssd(**given), gpu.ssd(**zero)):
        assert torch.equal(mine, theirs)


def test_no_tokens_leave_the_state_alone() -> None:
    given = arguments(3)
    none = {name: t[:, :0] if name in PER_TOKEN else t for name, t in given.items()}
    out, state = gpu.ssd(**none)
    assert out.shape == none["x"].shape and torch.equal(state, given["initial"])


def test_small_steps_behind_large_ones_keep_their_digits() -> None:
    """A sum of steps of 50 has no digits left in fp32 where those of 1e-3 behind it are told apart."""
    given = arguments(32, 1, 4, 1, 3, batch=1)
    dt = torch.full_like(given["dt"], -7.0)
    dt[:, :10] = 50.0
    given |= {"dt": dt, "dt_bias": torch.zeros_like(given["dt_bias"]), "A": torch.full_like(given["A"], -16.0)}
    got, exact = (outputs_and_gradients(op, g) for op, g in ((gpu.ssd, given), (reference.ssd, doubles(given))))
    for name in ("out", "gradient of dt", "gradient of A"):
        assert error(got[name], exact[name]) <= 5e-6, name
    tail = slice(10, None)
    assert error(got["gradient of dt"][:, tail], exact["gradient of dt"][:, tail]) <= 5e-6


@pytest.mark.parametrize("raw", [-60.0, 50.0])
def test_extreme_steps(raw: float) -> None:
    given = arguments(9, 2, 4, 1, 3, batch=1)
    given |= {"dt": torch.full_like(given["dt"], raw), "dt_bias": torch.zeros_like(given["dt_bias"])}
    compare(given, 2e-5)


def test_a_sequence_alone_or_in_a_batch_is_the_same_to_the_bit() -> None:
    given = arguments(21, 2, 3, 1, 2, batch=3)
    together = gpu.ssd(**given)
    alone = {name: t[1:2] if name in (*PER_TOKEN, "initial") else t for name, t in given.items()}
    for mine, theirs in zip(gpu.ssd(**alone), together, strict=True):
        assert torch.equal(mine, theirs[1:2])


def test_any_memory_layout_gives_the_same_bits() -> None:
    given = arguments(20, 2, 3, 2, 5)
    plain = outputs_and_gradients(gpu.ssd, {name: t.contiguous() for name, t in given.items()})
    spread = {name: t.repeat_interleave(2, 1)[:, ::2] if name in PER_TOKEN else t for name, t in given.items()}
    turned = given | {"x": given["x"].transpose(2, 3).contiguous().transpose(2, 3)}
    for layout in (given, spread, turned):
        for name, value in outputs_and_gradients(gpu.ssd, layout).items():
            assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [((2, 1, 1, 1, 1), torch.float64, "reference for fp64"), ((2, 1, 1, 1, 257), torch.float32, "d_state.*256"),
     ((2, 1, 129, 1, 1), torch.float32, "headdim.*128")],
)  # fmt: skip
def test_what_it_cannot_do_is_said(shape: tuple[int, ...], dtype: torch.dtype, says: str) -> None:
    with pytest.raises(InputError, match=says):
        gpu.ssd(**arguments(*shape, dtype=dtype))


# The impact of tokens


@pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
@pytest.mark.parametrize("gated", [False, True])
def test_impact(reduce: str, gated: bool, nan_memory: None) -> None:
    for shape in [(1, 1, 1, 1, 1), (17, 4, 5, 2, 3), (67, 2, 3, 2, 5)]:
        s = arguments(*shape)
        gate = torch.randn(2, shape[1], shape[2], device=DEVICE) if gated else None
        got = impact_of(gpu, s, gate=gate, reduce=reduce)
        exact = impact_of(reference, doubles(s), gate=None if gate is None else gate.double(), reduce=reduce)
        assert got.shape == exact.shape and error(got, exact) <= 2e-6, shape


def test_impact_over_many_chunks_and_in_half_precision(nan_memory: None) -> None:
    s = arguments(64 * 3 + 1, 2, 3, 1, 4, dtype=torch.bfloat16)
    s["dt"] = s["dt"] - 6
    assert error(impact_of(gpu, s), impact_of(reference, doubles(s))) <= 1e-5


def test_a_nan_in_one_channel_is_a_nan_score() -> None:
    for channel, reduce in itertools.product((0, 4), ("max", "absmax", "l2")):
        s = arguments(5, 2, 5, 1, 3, batch=1)
        s["x"] = s["x"].clone()
        s["x"][0, 2, 1, channel] = float("nan")
        assert impact_of(gpu, s, reduce=reduce).isnan().tolist() == [[False, False, True, False, False]]


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(InputError, match="reduce: must be one of max, absmax, l2, got 'mean'"):
        impact_of(gpu, arguments(2), reduce="mean")


# The gated norm


def few_tokens(groups: int, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    given = on_device(norm_inputs(groups, channels, dtype))
    return {name: t[:, :7] if t.ndim == 3 else t for name, t in given.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize(("groups", "channels"), [(1, 5), (3, 12)])
def test_gated_norm(groups: int, channels: int, dtype: torch.dtype, tolerance: float, nan_memory: None) -> None:
    given = few_tokens(groups, channels, dtype)
    got, same = norm_gradients(gpu, given, groups), norm_gradients(reference, given, groups)
    for name, exact in norm_gradients(reference, doubles(given), groups).items():
        assert got[name].dtype == same[name].dtype and got[name].shape == exact.shape, name
        assert error(got[name], exact) <= tolerance, f"{name}: {error(got[name], exact):.1e}"


@pytest.mark.parametrize("kernel", [norm._forward_kernel, gated_norm._forward_kernel], ids=["norm", "gated norm"])
def test_eps_is_a_constant_of_its_kernel(kernel: Any) -> None:
    """Compiled, an argument would be rounded to fp32, which fp64 shows; the interpreter does not round it."""
    assert inspect.signature(kernel.fn).parameters["eps"].annotation == "tl.constexpr"


def test_gated_norm_adds_up_the_shares_of_its_weight(nan_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_norm, "HELD", 5 * 16)
    given = few_tokens(1, 12)
    got, exact = norm_gradients(gpu, given, 1), norm_gradients(reference, doubles(given), 1)
    assert error(got["weight"], exact["weight"]) <= 1e-6


# As a backend


def test_the_backend_takes_these() -> None:
    backend = resolve("triton", "cuda")
    assert (backend.ssd, backend.ssd_impact, backend.gated_rms_norm) == (
        ssd_scan.ssd, ssd_scores.ssd_impact, gated_norm.gated_rms_norm,
    )  # fmt: skip


def test_as_operations_of_torch() -> None:
    """Shapes inferred without data are those of the data; the gradient formulas are registered."""
    given = list(arguments(3, 2, 3, 1, 2).values())
    leaves = [t.detach().requires_grad_() for t in given]
    torch.library.opcheck(ssd_scan._ssd, leaves, test_utils=CHECKS)
    out, final = ssd_scan._ssd(*given)
    torch.library.opcheck(ssd_scan._ssd_backward, (*given, out, final), test_utils=CHECKS)
    x, dt, bias, A, B, C, *_ = given
    torch.library.opcheck(ssd_scores._impact, (x, dt, bias, A, B, C[:, -1], None, "max"), test_utils=CHECKS)
    norm = [t.requires_grad_() for t in on_device(norm_inputs(2, 4, torch.float32)).values()]
    torch.library.opcheck(gated_norm._norm, (*norm, 1e-5, 2), test_utils=CHECKS)


COMPILE = """
import re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from simba_lab.kernels.gpu import gated_norm, ssd_backward, ssd_kernels, ssd_scores

SINGLE = {"delta", "high", "low", "later", "scores", "inverse", "final", "initial", "first", "last", "slots", "A", "D",
          "dt_bias", "direct", "dlogs", "dB", "dC", "dD", "weight", "partial"}
HALF = {"x", "dt", "B", "C", "out", "dout", "values", "vectors", "states", "dstates", "dx", "gate", "y", "z", "dy",
        "dz"}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

def kind(name, constants):
    if name in constants:
        return "constexpr"
    return "*fp32" if name in SINGLE else "*bf16" if name in HALF else "fp32" if name == "eps" else "i32"

def spills(name, kernel, warps, **constants):
    signature = {argument: kind(argument, constants) for argument in kernel.arg_names}
    at = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    aligned = {at[a]: [["tt.divisibility", 16]] for a in at if signature[a] != "constexpr"}
    source = ASTSource(kernel, signature, {at[a]: value for a, value in constants.items()}, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx), file.flush()
        command = [PTXAS, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(name, re.search(r"(\\d+) bytes spill stores", said)[1])

P, N = 64, 128
shape = {"P": P, "N": N, "CHUNK": 64, "WIDTH": P, "FAST": True}
tensor = shape | {"PRECISION": "tf32"}
spills("sums", ssd_kernels.step_sums, 4, CHUNK=64, HEADS=16, FAST=True)
spills("walk", ssd_kernels.walk_states, 4, **tensor, STATES=32, REVERSE=False, STAGES=3, last=None)
spills("walk-back", ssd_kernels.walk_states, 4, **tensor, STATES=32, REVERSE=True, STAGES=3)
spills("scan", ssd_kernels.scan_chunks, 4, **tensor, STATES=N, STAGES=2)
spills("heads", ssd_backward.head_gradients, 8, **tensor, STATES=64)
spills("vectors", ssd_backward.vector_gradients, 8, **tensor, STATES=N, STAGES=2)
spills("later", ssd_scores.sum_later, 1, CHUNK=64, BLOCK=256)
spills("impact", ssd_scores.reduce_impacts, 2, **shape, STATES=N, TOKENS=16, REDUCE=0, STAGES=4)
block, warps = gated_norm.row_layout(5120)
spills("norm", gated_norm._forward_kernel, warps, BLOCK=block)
spills("norm-back", gated_norm._backward_kernel, warps, BLOCK=block)
"""


def test_kernels_compile_for_the_gpu() -> None:
    """For Hopper, at Mamba-2 2.7b's sizes in bf16, without a GPU; at most 16 registers of a thread are spilled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spilled = {name: int(spilled) for name, spilled in map(str.split, run.stdout.splitlines())}
    kernels = ("sums", "walk", "walk-back", "scan", "heads", "vectors", "later", "impact", "norm", "norm-back")
    assert tuple(spilled) == kernels
    assert {name for name, amount in spilled.items() if amount} <= {"scan", "norm-back"}
    assert max(spilled.values()) <= 64
