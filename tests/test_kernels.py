"""Kernels: the reference against formulas written independently, every fast backend against the reference."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from slow_oracle import causal_conv, impact_by_removal, silu, softplus, unrolled_scan
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import available_backends, backend_names, cpu, reference, resolve
from simba_lab.kernels.cpu import impact_ops, scan_ops

SCAN = ("x", "dt", "dt_bias", "A", "B", "C", "D", "z", "initial")
PER_TOKEN = ("x", "dt", "B", "C", "z")
CONV = ("x", "weight", "bias", "initial")
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127)
CHANNELS = (1, 5, 31, 33, 63, 64, 65, 97, 128)
# Largest error allowed, relative to the largest entry of the tensor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
WIDE = {torch.float64: torch.float64} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32)


def inputs(batch: int, length: int, channels: int, states: int = 4, dtype: torch.dtype = torch.float64) -> dict:
    """Arguments of the scan. x, z, B and C are slices of wider tensors, as they are behind a projection."""
    generator = torch.Generator().manual_seed(100 * length + channels)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x, z = draw(batch, length, 2 * channels).chunk(2, dim=-1)
    _, B, C = draw(batch, length, 3 + 2 * states).split((3, states, states), dim=-1)
    A = -torch.exp(draw(channels, states)).to(WIDE[dtype])
    initial = draw(batch, channels, states).to(WIDE[dtype])
    return {
        "x": x, "dt": draw(batch, length, channels), "dt_bias": draw(channels), "A": A, "B": B, "C": C,
        "D": draw(channels), "z": z, "initial": initial,
    }  # fmt: skip


def conv_inputs(batch: int, length: int, channels: int, width: int = 4, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(100 * length + channels)
    wide = torch.randn(batch, length, 2 * channels, generator=generator, dtype=torch.float64).to(dtype)
    others = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((channels, width), (channels,), (batch, width - 1, channels))
    )
    return dict(zip(CONV, (wide[..., channels:], *others), strict=True))


def outputs_and_gradients(op: Callable, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both outputs of an op and the gradients of a fixed random functional of them, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items()}
    out, last = op(**leaves)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (out, last)]
    loss = (out * weights[0]).sum() + (last * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "last": last.detach(), **named}


def compare(op: str, arguments: dict[str, Tensor], tolerance: float) -> None:
    """Numba on ``arguments`` against the reference in fp64 on the same numbers; dtypes against the reference's."""
    got = outputs_and_gradients(getattr(cpu, op), arguments)
    same_dtype = outputs_and_gradients(getattr(reference, op), arguments)
    exact = outputs_and_gradients(getattr(reference, op), {k: v.double() for k, v in arguments.items()})
    for name, truth in exact.items():
        assert got[name].dtype == same_dtype[name].dtype and got[name].shape == truth.shape, name
        if truth.numel() == 0:
            continue
        error = (got[name].double() - truth).abs().amax() / truth.abs().amax().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every kernel compiled before memory is poisoned: Numba would otherwise compile the poisoned allocator."""
    for dtype in (torch.float32, torch.float64):
        outputs_and_gradients(cpu.selective_scan, inputs(1, 2, 3, dtype=dtype))
        outputs_and_gradients(cpu.causal_conv, conv_inputs(1, 2, 3, dtype=dtype))
        impact_of(cpu, inputs(1, 2, 3, dtype=dtype))


def channels_first(value: Tensor) -> Tensor:
    """The same numbers in memory that runs (batch, channel, token)."""
    return value.mT.contiguous().mT if value.ndim > 1 else value


def impact_of(backend: ModuleType, signals: dict[str, Tensor], **options: object) -> Tensor:
    arguments = (signals[name] for name in ("x", "dt", "dt_bias", "A", "B"))
    return backend.global_impact(*arguments, signals["C"][:, -1], **options)


# The reference


@pytest.mark.parametrize("length", [1, 2, 9])
def test_reference_scan_is_the_unrolled_sum(length: int) -> None:
    s = inputs(2, length, 5)
    y, _ = reference.selective_scan(*(s[name] for name in SCAN[:-1]))
    delta = softplus(s["dt"] + s["dt_bias"])
    for i in range(2):
        expected = unrolled_scan(s["x"][i], delta[i], s["A"], s["B"][i], s["C"][i], s["D"]) * silu(s["z"][i])
        torch.testing.assert_close(y[i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "width"), [(1, 4), (3, 4), (9, 4), (5, 1), (5, 2)])
def test_reference_convolution_is_the_weighted_sum(length: int, width: int) -> None:
    s = conv_inputs(2, length, 5, width)
    out, last = reference.causal_conv(s["x"], s["weight"], s["bias"])
    for i in range(2):
        torch.testing.assert_close(out[i], causal_conv(s["x"][i], s["weight"], s["bias"]), rtol=1e-12, atol=1e-12)
    padded = torch.cat([torch.zeros(2, width - 1, 5, dtype=torch.float64), s["x"]], dim=1)
    assert torch.equal(last, padded[:, length:])


# Fast against reference: outputs and all gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "channels"), list(zip(LENGTHS, CHANNELS, strict=True)) + [(33, 128), (127, 5)])
def test_scan_equals_reference(compiled, nan_memory, length: int, channels: int, dtype: torch.dtype) -> None:
    arguments = inputs(2, length, channels, states=3 if length % 2 else 16, dtype=dtype)
    compare("selective_scan", arguments, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("length", "channels"), list(zip(LENGTHS, CHANNELS, strict=True)))
def test_convolution_equals_reference(compiled, nan_memory, length: int, channels: int, dtype: torch.dtype) -> None:
    for width in (1, 2, 4):
        compare("causal_conv", conv_inputs(2, length, channels, width, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv"])
def test_half_precision_comes_back_as_half_and_accumulates_in_single(compiled, nan_memory, op: str) -> None:
    make = inputs if op == "selective_scan" else conv_inputs
    compare(op, make(2, 37, 65, dtype=torch.bfloat16), TOLERANCE[torch.bfloat16])
    arguments = make(2, 37, 65, dtype=torch.bfloat16)
    fast, slow = (getattr(backend, op)(**arguments) for backend in (cpu, reference))
    torch.testing.assert_close(fast[0], slow[0], rtol=2**-7, atol=1e-6)  # the same up to the last bit of bf16
    assert fast[1].dtype == slow[1].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_memory_layout_gives_the_same_numbers(compiled, dtype: torch.dtype) -> None:
    arguments = inputs(3, 35, 66, dtype=dtype)
    plain = outputs_and_gradients(cpu.selective_scan, {k: v.contiguous() for k, v in arguments.items()})
    layouts = {
        "slices": arguments,
        "channels first": {name: channels_first(value) for name, value in arguments.items()},
        "every second token": {**arguments, **{k: arguments[k].repeat_interleave(2, 1)[:, ::2] for k in PER_TOKEN}},
    }
    for name, layout in layouts.items():
        for key, value in outputs_and_gradients(cpu.selective_scan, layout).items():
            assert torch.equal(value, plain[key]), f"{name}: {key}"
    expanded = arguments["x"][:1].expand(3, -1, -1)
    outs = [cpu.selective_scan(**{**arguments, "x": x})[0] for x in (expanded, expanded.contiguous())]
    assert torch.equal(*outs)


@pytest.mark.parametrize("step", [-200.0, -14.0, -1.0, 0.0, 50.0])
def test_extreme_steps_keep_their_digits(compiled, nan_memory, step: float) -> None:
    """delta near 0 (e-200, 1e-6) and 50: values and the gradient of dt to fp32 accuracy, entry by entry."""
    arguments = inputs(2, 40, 66, dtype=torch.float32)
    arguments["dt"] = torch.full((2, 40, 66), step)
    arguments["dt_bias"] = torch.zeros(66)
    compare("selective_scan", arguments, TOLERANCE[torch.float32])
    got = outputs_and_gradients(cpu.selective_scan, arguments)["gradient of dt"].double()
    doubles = {name: value.double() for name, value in arguments.items()}
    exact = outputs_and_gradients(reference.selective_scan, doubles)["gradient of dt"]
    clear = exact.abs() > max(1e-30, 1e-2 * exact.abs().amax().item())
    assert ((got - exact).abs()[clear] <= 2e-4 * exact.abs()[clear]).all()


@pytest.mark.parametrize("name", SCAN)
def test_a_nan_that_enters_the_scan_comes_out(compiled, name: str) -> None:
    arguments = inputs(1, 5, 3, dtype=torch.float32)
    arguments[name] = arguments[name].clone()
    arguments[name][..., 0] = float("nan")
    fast, slow = (backend.selective_scan(**arguments) for backend in (cpu, reference))
    assert slow[0].isnan().any()
    assert [t.isnan().tolist() for t in fast] == [t.isnan().tolist() for t in slow]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_threads(compiled, dtype: torch.dtype) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scan = outputs_and_gradients(cpu.selective_scan, inputs(3, 70, 130, dtype=dtype))
            conv = outputs_and_gradients(cpu.causal_conv, conv_inputs(3, 130, 70, dtype=dtype))
            impact = impact_of(cpu, inputs(3, 70, 130, dtype=dtype), reduce="l2")
            results.append([*scan.values(), *conv.values(), impact])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_first_kernel_leaves_torchs_number_of_threads_alone() -> None:
    """In a process of its own: Numba's OpenMP pool starts with the first kernel and sets the number for all."""
    code = (
        "import numba, torch; from simba_lab.kernels import cpu; torch.set_num_threads(1)\n"
        "cpu.causal_conv(torch.ones(1, 3, 2), torch.ones(2, 4), torch.ones(2))\n"
        "print(torch.get_num_threads(), numba.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1 1\n"), done.stderr


@pytest.mark.parametrize("backend", [cpu, reference], ids=["numba", "reference"])
def test_a_sequence_in_pieces_equals_the_whole(backend: ModuleType) -> None:
    s, c = inputs(2, 41, 7), conv_inputs(2, 41, 7)
    whole, final = backend.selective_scan(**s)
    filtered, last = backend.causal_conv(**c)
    state, before, outs, convs = s["initial"], c["initial"], [], []
    for start, end in itertools.pairwise((0, 1, 2, 4, 37, 41)):  # pieces shorter and longer than the convolution
        tokens = {name: s[name][:, start:end] for name in PER_TOKEN}
        out, state = backend.selective_scan(**{**s, **tokens, "initial": state})
        conv, before = backend.causal_conv(c["x"][:, start:end], c["weight"], c["bias"], before)
        outs.append(out)
        convs.append(conv)
    for got, expected in ((torch.cat(outs, 1), whole), (state, final), (torch.cat(convs, 1), filtered)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(before, last)


@pytest.mark.parametrize("backend", [cpu, reference], ids=["numba", "reference"])
def test_no_tokens_give_no_output_and_pass_the_state_on(backend: ModuleType) -> None:
    s, c = inputs(2, 0, 5), conv_inputs(2, 0, 5)
    for op, arguments in ((backend.selective_scan, s), (backend.causal_conv, c)):
        out, last = op(**arguments)
        assert out.shape == (2, 0, 5) and torch.equal(last, arguments["initial"])
    if backend is cpu:
        gradients = outputs_and_gradients(backend.selective_scan, s)
        assert gradients["gradient of initial"].abs().sum() > 0 and gradients["gradient of A"].abs().sum() == 0


# Autograd and tracers


def test_gradcheck_in_double_precision(compiled) -> None:
    s, c = inputs(2, 3, 2, states=2), conv_inputs(1, 5, 2, width=3)
    for op, arguments in ((cpu.selective_scan, s), (cpu.causal_conv, c)):
        leaves = [value.detach().clone().requires_grad_() for value in arguments.values()]
        assert torch.autograd.gradcheck(op, leaves)


def test_custom_ops_keep_torchs_contract(compiled) -> None:
    s, c = inputs(2, 5, 3, dtype=torch.float32), conv_inputs(2, 5, 3, dtype=torch.float32)
    leaves = [s[name].detach().clone().requires_grad_() for name in SCAN]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scan_ops._scan, (*leaves, True), test_utils=checks)
    torch.library.opcheck(scan_ops._scan, (*(t.detach() for t in leaves), False), test_utils=checks)
    torch.library.opcheck(scan_ops._scored, (*leaves, True, torch.ones(2, 3), 4, "l2"), test_utils=checks)
    convolved = [c[name].detach().clone().requires_grad_() for name in CONV]
    torch.library.opcheck(cpu._conv, (*convolved, torch.empty(0, 0, dtype=torch.int64)), test_utils=checks)
    scored = (*(s[name] for name in ("x", "dt", "dt_bias", "A", "B")), s["C"][:, -1], torch.ones(2, 3), "max", False)
    torch.library.opcheck(impact_ops._impact, scored, test_utils=checks)


def test_ops_run_without_data() -> None:
    s = {name: value.to("meta") for name, value in inputs(2, 7, 5, dtype=torch.bfloat16).items()}
    y, final = cpu.selective_scan(**s)
    assert (y.shape, y.dtype, final.shape, final.dtype) == ((2, 7, 5), torch.bfloat16, (2, 5, 4), torch.float32)
    c = {name: value.to("meta") for name, value in conv_inputs(2, 7, 5, dtype=torch.bfloat16).items()}
    out, last = cpu.causal_conv(**c)
    assert (out.shape, out.dtype, last.shape, last.dtype) == ((2, 7, 5), torch.bfloat16, (2, 3, 5), torch.bfloat16)
    assert impact_of(cpu, s).shape == (2, 7)


def test_powers_of_two_are_exact_to_single_precision_and_never_negative() -> None:
    """The decays of the scan: every exponent they may have, what lies below it, and a NaN."""
    import numba
    import numpy as np

    from simba_lab.kernels.cpu.elementary import exp2

    @numba.njit
    def powers(values, out):  # noqa: ANN001, ANN202 - compiled
        for i in range(values.size):
            out[i] = exp2(values[i])

    x = np.concatenate([np.linspace(-125, 20, 200_001), np.arange(-125, 21)]).astype(np.float32)
    out, ends = np.empty_like(x), np.empty(3, np.float32)
    powers(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 2e-7
    powers(np.array([-1e30, -np.inf, np.nan], np.float32), ends)
    assert (ends[:2] == np.float32(2.0**-125)).all() and np.isnan(ends[2])


def test_freed_memory_stays_in_the_process() -> None:
    """In a process of its own: after a warm-up, using and freeing 100 MB costs next to no page faults."""
    code = (
        "import resource, torch; from simba_lab.kernels.cpu.memory import keep_freed; kept = keep_freed()\n"
        "def work(): [torch.ones(2 << 20) for _ in range(12)]\n"
        "for _ in range(5): work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nwork()\n"
        "print(not kept or resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# Global impact


@pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_impact_is_what_the_boundary_loses(compiled, nan_memory, reduce: str, gated: bool, dtype: torch.dtype) -> None:
    """Both backends against the recurrence run again without each token."""
    for length, channels in ((1, 3), (2, 33), (17, 32), (49, 70)):
        s = inputs(2, length, channels, dtype=dtype)
        gate = silu(s["z"][:, -1]) if gated else None
        delta = softplus(s["dt"].double() + s["dt_bias"].double())
        lost = torch.stack([impact_by_removal(s["x"][i], delta[i], s["A"], s["B"][i], s["C"][i, -1]) for i in range(2)])
        lost = lost * gate.double()[:, None] if gated else lost
        expected = {"max": lost.amax(-1), "absmax": lost.abs().amax(-1), "l2": lost.square().sum(-1).sqrt()}[reduce]
        for backend in (cpu, reference):
            got = impact_of(backend, s, gate=gate, reduce=reduce)
            scale = expected.abs().amax().item()
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
            assert got.dtype == dtype


def test_impacts_and_the_skip_sum_to_the_boundarys_output() -> None:
    s = inputs(3, 29, 6)
    delta = softplus(s["dt"] + s["dt_bias"])
    impact = reference.impact_per_channel(s["x"], delta, s["A"], s["B"], s["C"][:, -1])
    y, _ = cpu.selective_scan(*(s[name] for name in SCAN[:-1]))
    ungated = y[:, -1] / silu(s["z"][:, -1])
    torch.testing.assert_close(impact.sum(1) + s["D"] * s["x"][:, -1], ungated, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
def test_impact_of_long_sequences_whose_states_have_vanished(compiled, reduce: str) -> None:
    """Steps near 1 and A to -16: after some tokens most states are 0 for good; some channels forget slowly."""
    s = inputs(2, 700, 70, states=16, dtype=torch.float32)
    s["A"] = -torch.arange(1.0, 17).expand(70, 16).contiguous()
    s["dt_bias"][::7] -= 6
    fast = impact_of(cpu, s, reduce=reduce)
    exact = impact_of(reference, {name: value.double() for name, value in s.items()}, reduce=reduce)
    assert exact[:, 0].abs().min() > 0
    torch.testing.assert_close(fast.double(), exact, rtol=1e-3, atol=1e-7 * exact.abs().max().item())


def test_impact_of_tokens_beyond_every_state_is_nothing(compiled) -> None:
    s = inputs(1, 200, 40, dtype=torch.float32)
    s["dt"] = torch.full((1, 200, 40), 3.0)
    s["A"] = torch.full((40, 4), -2.0)
    assert impact_of(cpu, s)[0, :150].abs().max() < 1e-30


def test_a_nan_in_one_channel_is_a_nan_score(compiled) -> None:
    for channel, reduce in itertools.product((0, 2, 36), ("max", "absmax", "l2")):
        s = inputs(1, 5, 37, dtype=torch.float32)
        s["x"] = s["x"].clone()
        s["x"][0, 2, channel] = float("nan")
        for backend in (cpu, reference):
            assert impact_of(backend, s, reduce=reduce).isnan().tolist() == [[False, False, True, False, False]]


@pytest.mark.parametrize("channels", [5, 70, 300])
def test_an_impact_may_be_negative_in_every_channel(compiled, nan_memory, channels: int) -> None:
    """Lanes that no channel fills must not win, and the winner may stand in any block of channels."""
    s = inputs(2, 9, channels, dtype=torch.float32)
    s |= {"x": -s["x"].abs(), "B": s["B"].abs(), "C": s["C"].abs()}
    for reduce in ("max", "absmax", "l2"):
        exact = impact_of(reference, {name: value.double() for name, value in s.items()}, reduce=reduce)
        assert (exact < 0).all() == (reduce == "max")
        torch.testing.assert_close(impact_of(cpu, s, reduce=reduce).double(), exact, rtol=1e-5, atol=0)


# Tokens that go on


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_selected_tokens_are_those_of_a_sort(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    values = torch.tensor([0.0, -0.0, 1.0, 2.0, torch.nan, torch.inf, -torch.inf])
    positions = torch.arange(length).mul(3).expand(2, length)
    for k, protected, _ in itertools.product(range(1, length + 1), range(1, 4), range(4)):
        scores = values[torch.randint(len(values), (2, length), generator=generator)]
        given = (scores, k, min(k, protected), positions)
        for mine, sorted_ in zip(cpu.select_tokens(*given), reference.select_tokens(*given), strict=True):
            assert torch.equal(mine, sorted_), given


def test_kept_tokens_bring_their_rows_and_gradients() -> None:
    hidden, residual = torch.randn(2, 3, 9, 5, generator=torch.Generator().manual_seed(0)).unbind()
    residual = residual.double().mT.contiguous().mT
    chosen = torch.tensor([[0, 3, 6], [1, 2, 6], [4, 5, 6]])
    results = []
    for backend in (cpu, reference):
        streams = [stream.detach().requires_grad_() for stream in (hidden, residual)]
        kept = backend.keep_tokens(*streams, chosen, 7)
        assert [t.shape for t in kept] == [(3, 5, 5)] * 2
        results.append([*kept, *torch.autograd.grad(sum(t.square().sum() for t in kept), streams)])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


# Choosing a backend


def test_backends_are_chosen_by_name_and_only_auto_may_choose() -> None:
    assert backend_names() == ["auto", "triton", "numba", "reference", "mamba_ssm", "causal_conv1d"]
    assert {name for name, reason in available_backends("cpu").items() if reason is None} == {"numba", "reference"}
    assert resolve("auto", "cpu").name == "numba" and resolve("auto", "cuda").name == "triton"
    assert resolve("reference", "cpu").selective_scan is reference.selective_scan
    assert resolve("numba", "cpu").global_impact is cpu.global_impact


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [("triton", "cpu", "not for cpu"), ("numba", "cuda", "not for cuda"), ("nimba", "cpu", "use one of auto, .*numba")],
)
def test_a_backend_that_cannot_run_is_an_error(name: str, device: str, says: str) -> None:
    with pytest.raises(InputError, match=f"backend: '{name}'.*{says}"):
        resolve(name, device)


def test_numba_missing_is_said_and_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "numba is not installed" in available_backends("cpu")["numba"]
    assert resolve("auto", "cpu").name == "reference"
    with pytest.raises(InputError, match="backend: 'numba' cannot run on cpu"):
        resolve("numba", "cpu")
