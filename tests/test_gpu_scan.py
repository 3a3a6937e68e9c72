"""Triton's selective scan against the reference in fp64, on CUDA or else in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_kernels import inputs, outputs_and_gradients
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import reference

pytest.importorskip("triton")
from simba_lab.kernels.gpu import launch, scan  # noqa: E402 - they need triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative norm of the error: the bounds are 1e-4 in fp32 and 1e-2 in bf16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
LENGTHS = (1, 7, 8, 9, 65)


def arguments(batch: int, length: int, channels: int, states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in inputs(batch, length, channels, states, dtype).items()}


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(given: dict[str, Tensor], tolerance: float) -> None:
    """Outputs and all gradients against the reference in fp64; dtypes against the reference's own."""
    got = outputs_and_gradients(scan.selective_scan, given)
    same = outputs_and_gradients(reference.selective_scan, given)
    truth = outputs_and_gradients(reference.selective_scan, {name: t.double() for name, t in given.items()})
    for name, exact in truth.items():
        assert got[name].dtype == same[name].dtype and got[name].shape == exact.shape, name
        assert error(got[name], exact) <= tolerance, f"{name}: {error(got[name], exact):.1e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("channels", "states"), [(5, 3), (24, 4)])
def test_outputs_and_gradients(length: int, channels: int, states: int, nan_memory: None) -> None:
    compare(arguments(2, length, channels, states, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, nan_memory: None) -> None:
    compare(arguments(1, 13, 9, 4, dtype), TOLERANCE[dtype])


def test_vectors_read_in_pairs(nan_memory: None) -> None:
    """Two neighbouring bf16 of B and C are one word where alignment allows; the test's other slices start odd."""
    given = arguments(1, 13, 9, 4, torch.bfloat16)
    pair = torch.cat([given["B"][..., :1], given["B"], given["C"]], dim=-1)
    assert not scan._paired(pair[..., 1:5], pair[..., 5:])
    pair = pair[..., 1:].contiguous()
    given |= {"B": pair[..., :4], "C": pair[..., 4:]}
    assert scan._paired(given["B"], given["C"])
    compare(given, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_segments_of_the_backward_pass_do_not_show(
    parts: int, nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "segments", lambda programs, windows, device: min(parts, windows))
    compare(arguments(1, 2 * scan.WINDOW + 3, 5, 3, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("whole", "parts"), [(0, 2), (1, 3), (5, 2)])
def test_segments_of_the_forward_pass_do_not_show(
    whole: int, parts: int, nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: three sequences of two blocks of channels, of which the first ``whole`` are not cut."""
    given = arguments(3, 2 * scan.WINDOW + 3, 9, 3, torch.float32)
    monkeypatch.setattr(launch, "forward_block", lambda batch, channels, states, device: (8, 6))
    monkeypatch.setattr(launch, "forward_split", lambda programs, windows, device: (programs, 1))
    uncut = scan._scan(*given.values(), True)
    monkeypatch.setattr(launch, "forward_split", lambda programs, windows, device: (whole, parts))
    for mine, theirs in zip(scan._scan(*given.values(), True), uncut, strict=True):
        assert torch.equal(mine, theirs)


def test_channels_to_a_program_do_not_show(nan_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: how many a program takes depends on the batch, what a sequence gives must not."""
    given, results = arguments(2, 13, 24, 16, torch.float32), []
    for shape in ((8, 6), (16, 4)):
        monkeypatch.setattr(launch, "forward_block", lambda batch, channels, states, device, shape=shape: shape)
        results.append(scan._scan(*given.values(), True))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_few_states_always_take_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer than 16 states another number of channels sums them in another order."""
    monkeypatch.setattr(launch, "_schedulers", lambda device: 528)
    device = torch.device("cpu")
    assert [launch.forward_block(batch, 5120, 8, device)[0] for batch in (1, 8)] == [8, 8]


def test_only_a_partly_filled_round_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_schedulers", lambda device: 528)
    device = torch.device("cpu")
    split = [launch.forward_split(programs, 256, device) for programs in (128, 192, 528, 640, 1000, 1536, 5120)]
    assert split == [(0, 4), (0, 2), (528, 1), (528, 4), (1000, 1), (1536, 1), (5120, 1)]
    assert launch.forward_split(192, 32, device) == (192, 1) and launch.forward_split(768, 32, device) == (528, 2)
    blocks = [launch.forward_block(*shape, 16, device)[0] for shape in ((8, 5120), (16, 1536), (8, 1536), (1, 5120))]
    assert blocks == [16, 16, 8, 8]
    parts = [launch.segments(programs, 256, device) for programs in (640, 1536, 3072)]
    assert parts == [8, 2, 1]


def test_it_reads_nothing_around_its_tokens() -> None:
    given = arguments(1, 13, 9, 4, torch.float32)
    expected = outputs_and_gradients(scan.selective_scan, given)
    for name in ("x", "dt", "B", "C", "z"):
        given[name] = torch.nn.functional.pad(given[name], (0, 0, 8, 8), value=float("nan"))[:, 8:-8]
    for name, value in outputs_and_gradients(scan.selective_scan, given).items():
        assert torch.equal(value, expected[name]), name


def test_it_continues_from_a_state() -> None:
    given = arguments(2, 11, 5, 4, torch.float32)
    whole, final = scan.selective_scan(**given)
    state, parts = given["initial"], []
    for tokens in (slice(0, 1), slice(1, 6), slice(6, 11)):
        part = {name: t[:, tokens] if name in ("x", "dt", "B", "C", "z") else t for name, t in given.items()}
        out, state = scan.selective_scan(**part | {"initial": state})
        parts.append(out)
    assert error(torch.cat(parts, 1), whole.double()) <= 1e-6 and error(state, final.double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "states"), [(5, 3), (201, 16), (1, 1)])
def test_a_single_step_has_a_kernel_of_its_own(
    channels: int, states: int, dtype: torch.dtype, nan_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan's own is taken away: it would do, in twice the time. The state that comes in stays as it is."""
    monkeypatch.setattr(scan, "scan_forward", None)
    given = arguments(3, 1, channels, states, dtype)
    before = given["initial"].clone()
    with torch.no_grad():
        got = scan.selective_scan(**given)
        truth = reference.selective_scan(**{name: t.double() for name, t in given.items()})
    for mine, exact in zip(got, truth, strict=True):
        assert error(mine, exact) <= TOLERANCE[dtype]
    assert torch.equal(given["initial"], before) and got[1].dtype == torch.float32


@pytest.mark.parametrize("raw", [-60.0, -14.0, 0.0, 50.0])
def test_steps_one_by_one_are_the_scan(raw: float, nan_memory: None) -> None:
    """Also where a step is next to nothing and where it forgets all."""
    given = arguments(2, 5, 9, 4, torch.float32)
    given |= {"dt": given["dt"] + raw}
    whole, final = scan.selective_scan(**given)
    state, rows = given["initial"], []
    for t in range(5):
        now = {name: given[name][:, t : t + 1] for name in ("x", "dt", "B", "C", "z")}
        row, state = scan.selective_scan(**given | now | {"initial": state})
        rows.append(row)
    assert error(torch.cat(rows, 1), whole.double()) <= 1e-6 and error(state, final.double()) <= 1e-6


def test_without_a_state_it_starts_from_zero() -> None:
    given = arguments(1, 9, 5, 4, torch.float32)
    zero = given | {"initial": torch.zeros_like(given["initial"])}
    del given["initial"]
    for mine, theirs in itertools.zip_longest(scan.selective_scan(**given), scan.selective_scan(**zero)):
        assert torch.equal(mine, theirs)


def test_rates_and_states_of_any_layout() -> None:
    given = arguments(2, 9, 5, 4, torch.float32)
    given |= {"A": given["A"][:1].expand(5, 4), "initial": given["initial"].mT.contiguous().mT}
    given |= {"D": given["D"][:1].expand(5), "x": given["x"][:1].expand(2, -1, -1)}
    compare(given, TOLERANCE[torch.float32])


@pytest.mark.parametrize("raw", [-14.0, -60.0, 50.0])
def test_extreme_steps(raw: float) -> None:
    """softplus(-14) is 8e-7, softplus(-60) is 9e-27, softplus(50) is 50: finite and right."""
    given = arguments(1, 9, 5, 4, torch.float32)
    given |= {"dt": torch.full_like(given["dt"], raw), "dt_bias": torch.zeros_like(given["dt_bias"])}
    compare(given, 2e-5)


def test_a_sequence_alone_or_in_a_batch_is_the_same_to_the_bit() -> None:
    given = arguments(3, 13, 9, 4, torch.float32)
    together = outputs_and_gradients(scan.selective_scan, given)["out"]
    alone = {n: t[1:2] if n in ("x", "dt", "B", "C", "z", "initial") else t for n, t in given.items()}
    assert torch.equal(scan.selective_scan(**alone)[0], together[1:2])


def test_fp64_is_refused() -> None:
    with pytest.raises(InputError, match="reference for fp64"):
        scan.selective_scan(**arguments(1, 2, 5, 3, torch.float64))


def test_as_an_operation_of_torch() -> None:
    """Shapes inferred without data are those of the data; the gradient formula is registered."""
    given = arguments(1, 9, 5, 4, torch.float32)
    tensors = [t.detach().requires_grad_() for t in given.values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scan._scan, (*tensors, True), test_utils=checks)
    out, _, starts = scan._scan(*given.values(), True)
    operands = tuple(t for name, t in given.items() if name != "initial")
    torch.library.opcheck(scan._scan_backward, (*operands, starts, out, None), test_utils=checks)


@pytest.mark.gpu
def test_long_sequences_stay_finite_and_right() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    length, channels, states = 65_536, 16, 16
    given = {
        "x": draw(1, length, channels), "dt": draw(1, length, channels), "dt_bias": draw(channels) - 4,
        "A": -torch.arange(1, states + 1, device="cuda").float().expand(channels, states).contiguous(),
        "B": draw(1, length, states), "C": draw(1, length, states), "D": draw(channels), "z": draw(1, length, channels),
    }  # fmt: skip
    out, final = scan.selective_scan(**given)
    truth, state = reference.selective_scan(**{name: t.double() for name, t in given.items()})
    assert error(out, truth) <= 1e-4 and error(final, state) <= 1e-4
