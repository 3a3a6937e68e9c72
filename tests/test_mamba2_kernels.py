"""Kernels of Mamba-2: the reference against sums written independently, the CPU path against the reference."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch
from slow_oracle import impact_by_removal, softplus, unrolled_scan
from test_kernels import TOLERANCE, WIDE, channels_first, outputs_and_gradients
from torch import Tensor

from simba_lab.kernels import cpu, reference
from simba_lab.kernels.cpu import mamba2

SSD = ("x", "dt", "dt_bias", "A", "B", "C", "D", "initial")
PER_TOKEN = ("x", "dt", "B", "C")
BACKENDS = pytest.mark.parametrize("backend", [cpu, reference], ids=["numba", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Length, heads, channels per head, groups, states.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 3, 4), (127, 4, 3, 2, 5), (128, 2, 8, 1, 16), (129, 6, 2, 2, 3), (258, 4, 7, 4, 2)]


def inputs(
    length: int, heads: int = 4, width: int = 3, groups: int = 2, states: int = 5, batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    """Arguments of the scan; x, B, C and dt are slices of wider tensors, as they are behind projection and filter."""
    generator = torch.Generator().manual_seed(100 * length + heads)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inner, shared = heads * width, groups * states
    x, B, C = draw(batch, length, inner + 2 * shared).split((inner, shared, shared), dim=-1)
    return {
        "x": x.unflatten(-1, (heads, width)), "dt": draw(batch, length, heads + 2)[..., 2:], "dt_bias": draw(heads),
        "A": -torch.exp(draw(heads, dtype=WIDE[dtype])), "B": B.unflatten(-1, (groups, states)),
        "C": C.unflatten(-1, (groups, states)), "D": draw(heads),
        "initial": draw(batch, heads, width, states, dtype=WIDE[dtype]),
    }  # fmt: skip


def by_channel(s: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Sequence i for the oracle: every channel with its head's step, A and D, and its group's B and C."""
    (length, heads, width), (groups, states) = s["x"].shape[1:], s["B"].shape[2:]
    head = torch.arange(heads * width) // width
    group = head // (heads // groups)
    delta = softplus(s["dt"][i].double() + s["dt_bias"].double())
    return {
        "x": s["x"][i].double().reshape(length, -1), "delta": delta[:, head],
        "A": s["A"].double()[head][:, None].expand(-1, states), "B": s["B"][i].double()[:, group],
        "C": s["C"][i].double()[:, group], "D": s["D"].double()[head],
    }  # fmt: skip


def compare(arguments: dict[str, Tensor], tolerance: float, **options: int) -> None:
    """The CPU path on ``arguments`` against the reference in fp64 on the same numbers; dtypes are the reference's."""
    got = outputs_and_gradients(lambda **a: cpu.ssd(**a, **options), arguments)
    same_dtype = outputs_and_gradients(reference.ssd, arguments)
    exact = outputs_and_gradients(reference.ssd, {name: value.double() for name, value in arguments.items()})
    for name, truth in exact.items():
        assert got[name].dtype == same_dtype[name].dtype and got[name].shape == truth.shape, name
        error = (got[name].double() - truth).abs().amax() / truth.abs().amax().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"


def norm_inputs(groups: int, channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    wide = torch.randn(2, 37, 3 * channels, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    return {"y": wide[..., :channels], "z": wide[..., -channels:], "weight": weight}


def norm_gradients(backend: ModuleType, arguments: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    out = backend.gated_rms_norm(**leaves, eps=1e-3, groups=groups)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad((out * cotangent).sum(), list(leaves.values()))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def impact_of(backend: ModuleType, s: dict[str, Tensor], **options: object) -> Tensor:
    return backend.ssd_impact(*(s[name] for name in ("x", "dt", "dt_bias", "A", "B")), s["C"][:, -1], **options)


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every kernel compiled before memory is poisoned: Numba would otherwise compile the poisoned allocator."""
    for dtype in (torch.float32, torch.float64):
        norm_gradients(cpu, norm_inputs(1, 4, dtype), 1)
        outputs_and_gradients(cpu.ssd, inputs(2, dtype=dtype))


# The scan


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_reference_is_the_unrolled_sum(shape: tuple[int, ...]) -> None:
    s = inputs(*shape)
    y, _ = reference.ssd(*(s[name] for name in SSD[:-1]))
    for i in range(2):
        torch.testing.assert_close(y[i].flatten(1), unrolled_scan(**by_channel(s, i)), rtol=1e-11, atol=1e-11)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_reference(
    compiled, nan_memory, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    compare(inputs(*shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [1, 2, 7, 40, 41, 64, 256])
def test_chunks_of_any_size_give_the_same(compiled, nan_memory, chunk: int) -> None:
    compare(inputs(41), TOLERANCE[torch.float64], chunk_size=chunk)


def test_half_precision_comes_back_as_half_and_accumulates_in_single(compiled, nan_memory) -> None:
    arguments = inputs(67, dtype=torch.bfloat16)
    compare(arguments, TOLERANCE[torch.bfloat16])
    fast, slow = (backend.ssd(**arguments) for backend in (cpu, reference))
    torch.testing.assert_close(fast[0], slow[0], rtol=2**-7, atol=1e-5)
    assert (fast[0].dtype, fast[1].dtype) == (torch.bfloat16, torch.float32)


def test_any_memory_layout_gives_the_same_numbers() -> None:
    arguments = inputs(70)
    plain = outputs_and_gradients(cpu.ssd, {name: value.contiguous() for name, value in arguments.items()})
    layouts = {
        "slices": arguments,
        "channels first": {name: channels_first(value) for name, value in arguments.items()},
        "every second token": {**arguments, **{k: arguments[k].repeat_interleave(2, 1)[:, ::2] for k in PER_TOKEN}},
    }
    for name, layout in layouts.items():
        for key, value in outputs_and_gradients(cpu.ssd, layout).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")


@pytest.mark.parametrize("step", [-200.0, -14.0, -1.0, 0.0, 3.0, 50.0])
def test_extreme_steps_keep_their_digits(compiled, nan_memory, step: float) -> None:
    """delta near 0 (e-200, 1e-6) and 50: values and the gradient of dt to fp32 accuracy, entry by entry."""
    arguments = inputs(150, 3, 8, 1, 16, dtype=torch.float32)
    arguments["dt"] = torch.full((2, 150, 3), step)
    arguments["dt_bias"], arguments["A"] = torch.zeros(3), torch.tensor([-1.0, -4.0, -16.0])
    compare(arguments, TOLERANCE[torch.float32])
    got = outputs_and_gradients(cpu.ssd, arguments)["gradient of dt"].double()
    doubles = {name: value.double() for name, value in arguments.items()}
    exact = outputs_and_gradients(reference.ssd, doubles)["gradient of dt"]
    clear = exact.abs() > max(1e-30, 1e-2 * exact.abs().amax().item())
    assert ((got - exact).abs()[clear] <= 2e-4 * exact.abs()[clear]).all()


def test_small_steps_behind_large_ones_keep_their_digits(compiled, nan_memory) -> None:
    """Running sums of the decay reach -5000 inside a chunk; their differences behind it are near 0."""
    arguments = inputs(90, 3, 8, 1, 16, dtype=torch.float32)
    arguments["dt"] = torch.cat([torch.full((2, 40, 3), 8.0), torch.full((2, 50, 3), -4.0)], dim=1)
    arguments["dt_bias"], arguments["A"] = torch.zeros(3), torch.full((3,), -16.0)
    small = {name: value[:, 40:] if name in PER_TOKEN else value for name, value in arguments.items()}
    _, arguments["initial"] = cpu.ssd(**small)
    compare(arguments, 5e-6)


@BACKENDS
def test_no_output_sees_a_later_token(backend: ModuleType) -> None:
    """Bit for bit, on both sides of chunk boundaries (every 16 tokens, the last chunk short)."""
    s = inputs(37)
    s["dt_bias"] = s["dt_bias"] - 4  # a long memory
    before, _ = backend.ssd(**s, chunk_size=16)
    for place in (0, 15, 16, 17, 31, 32, 36):
        changed = {**s, **{name: s[name].clone() for name in PER_TOKEN}}
        for name in PER_TOKEN:
            changed[name][:, place] += 1
        after, _ = backend.ssd(**changed, chunk_size=16)
        assert torch.equal(before[:, :place], after[:, :place])
        assert not torch.isclose(before[:, place:], after[:, place:], rtol=1e-11, atol=0).any()


@BACKENDS
def test_a_sequence_in_pieces_equals_the_whole(backend: ModuleType) -> None:
    s = inputs(101)
    whole, final = backend.ssd(**s)
    state, outs = s["initial"], []
    for start, end in itertools.pairwise((0, 1, 2, 4, 66, 100, 101)):
        tokens = {name: s[name][:, start:end] for name in PER_TOKEN}
        out, state = backend.ssd(**{**s, **tokens, "initial": state})
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-12)


@BACKENDS
def test_no_tokens_give_no_output_and_pass_the_state_on(backend: ModuleType) -> None:
    s = inputs(0)
    out, last = backend.ssd(**s)
    assert out.shape == (2, 0, 4, 3) and torch.equal(last, s["initial"])


def test_gradcheck_contract_and_runs_without_data(compiled) -> None:
    s = inputs(5, 2, 2, 1, 2)
    leaves = [s[name].detach().clone().requires_grad_() for name in SSD]
    assert torch.autograd.gradcheck(lambda *a: cpu.ssd(*a, chunk_size=2), leaves)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    delta = softplus(s["dt"] + s["dt_bias"])
    arguments = [t.detach().clone().requires_grad_() for t in (s["x"], delta, *(s[n] for n in SSD[3:]))]
    torch.library.opcheck(mamba2._ssd, (*arguments, 2, True), test_utils=checks)
    gate = torch.ones(2, 2, 2, dtype=torch.float64)
    scored = (*(s[n] for n in SSD[:5]), s["C"][:, -1], gate, "max", True)
    torch.library.opcheck(mamba2._impact, scored, test_utils=checks)
    normed = [value.detach().clone().requires_grad_() for value in norm_inputs(2, 4).values()]
    torch.library.opcheck(mamba2._gated_norm, (*normed, 1e-3, 2), test_utils=checks)
    meta = {name: value.to("meta") for name, value in inputs(7, dtype=torch.bfloat16).items()}
    y, final = cpu.ssd(**meta)
    assert (y.shape, y.dtype, final.shape, final.dtype) == ((2, 7, 4, 3), torch.bfloat16, (2, 4, 3, 5), torch.float32)
    assert impact_of(cpu, meta).shape == (2, 7)


# The gated norm


@DTYPES
@pytest.mark.parametrize(("groups", "channels"), [(1, 1), (1, 67), (3, 33), (4, 128)])
def test_gated_norm_equals_reference(compiled, nan_memory, groups: int, channels: int, dtype: torch.dtype) -> None:
    arguments = norm_inputs(groups, channels, dtype)
    got = norm_gradients(cpu, arguments, groups)
    exact = norm_gradients(reference, {name: value.double() for name, value in arguments.items()}, groups)
    for name, truth in exact.items():
        assert got[name].dtype == dtype
        error = (got[name].double() - truth).abs().amax() / truth.abs().amax()
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


def test_gated_norm_of_halves_is_computed_in_single(compiled) -> None:
    arguments = norm_inputs(2, 8, torch.bfloat16)
    fast, slow = (backend.gated_rms_norm(**arguments, eps=1e-5, groups=2) for backend in (cpu, reference))
    assert fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, rtol=2**-7, atol=1e-6)


# Global impact


@pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
@pytest.mark.parametrize("gated", [False, True])
@DTYPES
def test_impact_is_what_the_boundary_loses(compiled, nan_memory, reduce: str, gated: bool, dtype: torch.dtype) -> None:
    """Both backends against the recurrence run again without each token, in fp64."""
    for shape in ((1, 2, 3, 1, 4), (17, 4, 3, 2, 5), (49, 6, 4, 3, 2)):
        s = inputs(*shape, dtype=dtype)
        lost = []
        for i in range(2):
            c = by_channel(s, i)
            lost.append(impact_by_removal(c["x"], c["delta"], c["A"], c["B"], c["C"][-1]))
        expected, gate = torch.stack(lost), None
        if gated:
            gate = torch.randn(2, shape[1], shape[2], dtype=torch.float64).to(dtype)
            expected = expected * gate.double().flatten(1)[:, None]
        reduced = {"max": expected.amax(-1), "absmax": expected.abs().amax(-1), "l2": expected.square().sum(-1).sqrt()}
        for backend in (cpu, reference):
            got = impact_of(backend, s, gate=gate, reduce=reduce)
            scale = expected.abs().amax().item()
            torch.testing.assert_close(got.double(), reduced[reduce], rtol=0, atol=TOLERANCE[dtype] * scale)
            assert got.dtype == dtype


def test_impacts_and_the_skip_sum_to_the_boundarys_output() -> None:
    s = inputs(29)
    delta = softplus(s["dt"] + s["dt_bias"])
    impact = reference.ssd_impact_per_channel(s["x"], delta, s["A"], s["B"], s["C"][:, -1])
    y, _ = cpu.ssd(*(s[name] for name in SSD[:-1]))
    torch.testing.assert_close(impact.sum(1) + s["D"][:, None] * s["x"][:, -1], y[:, -1], rtol=1e-11, atol=1e-11)
