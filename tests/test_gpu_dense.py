"""Triton's convolution and norm against the reference in fp64, on CUDA or else in Triton's interpreter.

Outputs, every gradient, layouts, dtypes, states carried on; and that the kernels compile for the GPU without spilling.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import reference

pytest.importorskip("triton")
from simba_lab.kernels.gpu import adjacency, conv, gather, norm  # noqa: E402 - they need triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error allowed, relative to the largest entry of the tensor.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALF = (torch.bfloat16, torch.float16)
LENGTHS, CHANNELS, WIDTHS = (1, 2, 3, 5, 8, 17, 33), (1, 5, 24, 40), (2, 3, 4)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def conv_arguments(batch: int, length: int, channels: int, width: int, initial: bool = True) -> list[Tensor]:
    """x (half of a wider tensor, as behind a projection), weight, bias, initial, in fp64."""
    x = draw(batch, length, 2 * channels)[..., channels:]
    before = [draw(batch, width - 1, channels, seed=2)] if initial else []
    return [x, draw(channels, width), draw(channels, seed=1), *before]


def norm_arguments(*shape: int, residual: bool = True) -> list[Tensor]:
    return [draw(*shape), draw(*shape, seed=1) if residual else None, draw(shape[-1]) + 2]


def normalise(op: Callable) -> Callable:
    return lambda *tensors: op(*tensors, 1e-5)


def only(used: int, op: Callable) -> Callable:
    """``op`` with one of its outputs, and all inputs as outputs so that each of them has a gradient."""
    return lambda *tensors: [op(*tensors)[used], *(2 * t for t in tensors if t is not None)]


def outputs_and_gradients(op: Callable, arguments: list[Tensor | None]) -> list[Tensor]:
    """Outputs of ``op`` and the gradients of a fixed random functional of all of them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in arguments]
    outs = op(*leaves)
    loss = sum((out * draw(*out.shape, seed=7, dtype=out.dtype)).sum() for out in outs)
    return [out.detach() for out in outs] + list(torch.autograd.grad(loss, [t for t in leaves if t is not None]))


def compare(fast: Callable, slow: Callable, arguments: list[Tensor | None], tolerance: float) -> None:
    """``fast`` on the arguments against ``slow`` in fp64 on the same numbers; dtypes against ``slow``'s own."""
    got, same_dtype = outputs_and_gradients(fast, arguments), outputs_and_gradients(slow, arguments)
    exact = outputs_and_gradients(slow, [None if t is None else t.double() for t in arguments])
    assert [t.dtype for t in got] == [t.dtype for t in same_dtype]
    for i, (value, truth) in enumerate(zip(got, exact, strict=True)):
        assert value.shape == truth.shape
        if truth.numel():
            error = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"output or gradient {i}: {error:.1e}"


def cast(arguments: list[Tensor | None], *dtypes: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t, dtype in zip(arguments, itertools.cycle(dtypes), strict=False)]


# Convolution


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("initial", [True, False])
def test_convolution_equals_reference(nan_memory: None, length: int, initial: bool) -> None:
    at = LENGTHS.index(length) + 3 * initial  # every width and batch size meets short and long sequences
    arguments = conv_arguments(
        1 + (at + 1) % 3 if length < 17 else 1, length, CHANNELS[at % 4], WIDTHS[at % 3], initial
    )
    compare(conv.causal_conv, reference.causal_conv, cast(arguments, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 24, 4), (2, 11, 5, 3)], ids=str)
def test_convolution_in_other_dtypes(nan_memory: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(conv.causal_conv, reference.causal_conv, cast(conv_arguments(*shape), dtype), TOLERANCE[dtype])


def test_convolution_of_half_precision_with_fp32_weights(nan_memory: None) -> None:
    """Under autocast: activations come from a product, weights are kept in fp32."""
    dtypes = (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    arguments = cast(conv_arguments(1, 9, 5, 4), *dtypes)
    compare(conv.causal_conv, reference.causal_conv, arguments, TOLERANCE[torch.bfloat16])


def test_convolution_over_several_blocks_of_channels(nan_memory: None) -> None:
    arguments = conv_arguments(2, 3, conv.BLOCK + 8, 4)
    compare(conv.causal_conv, reference.causal_conv, cast(arguments, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("used", [0, 1])
def test_convolution_when_only_one_output_is_used(used: int) -> None:
    fast, slow = (only(used, op.causal_conv) for op in (conv, reference))
    compare(fast, slow, conv_arguments(2, 2, 5, 4), 1e-12)


def test_convolution_of_any_layout() -> None:
    x, weight, bias, initial = conv_arguments(2, 4, 6, 3)
    columns = x.mT.contiguous().mT, weight.mT.contiguous().mT, draw(12, seed=1)[::2], initial.mT.contiguous().mT
    repeated = x[:1].expand(3, -1, -1), weight, bias, initial[:1].expand(3, -1, -1)
    for arguments in (columns, repeated, (x[:, ::2], weight, bias, initial)):
        compare(conv.causal_conv, reference.causal_conv, list(arguments), TOLERANCE[torch.float64])


@pytest.mark.parametrize("length", [1, 30, 31, 32, 33, 62, 134])
def test_convolution_reads_nothing_around_its_tokens(length: int) -> None:
    """Before and behind the tokens lies NaN, also where the last piece of the backward pass begins behind the end."""
    x, weight, bias = cast(conv_arguments(1, length, 5, 4, initial=False), torch.float32)
    dout = draw(1, length, 5, seed=3, dtype=torch.float32)
    expected = conv._conv_backward(x.contiguous(), weight, bias, None, dout, None)
    x, dout = (torch.nn.functional.pad(t, (0, 0, 8, 8), value=float("nan"))[:, 8:-8] for t in (x, dout))
    for mine, theirs in zip(conv._conv_backward(x, weight, bias, None, dout, None), expected, strict=True):
        assert torch.equal(mine, theirs) and not mine.isnan().any()


def test_convolution_continues_where_it_stopped(nan_memory: None) -> None:
    x, weight, bias, before = cast(conv_arguments(2, 15, 5, 4), torch.float32)
    whole, last = conv.causal_conv(x, weight, bias, before)
    outs = []
    for start, end in itertools.pairwise((0, 1, 2, 4, 4, 14, 15)):
        out, before = conv.causal_conv(x[:, start:end], weight, bias, before)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 1), whole) and torch.equal(before, last) and torch.equal(last, x[:, -3:])


def test_convolution_of_nothing_keeps_the_state(nan_memory: None) -> None:
    compare(conv.causal_conv, reference.causal_conv, conv_arguments(2, 0, 5, 4), 1e-12)
    compare(conv.causal_conv, reference.causal_conv, conv_arguments(0, 3, 5, 4), 1e-12)
    assert not conv.causal_conv(*conv_arguments(2, 0, 5, 4, initial=False))[1].any()


def test_pieces_add_up_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, results = cast(conv_arguments(1, 20, 5, 4), torch.float32), []
    for programs in (1, 1, 1024):  # one piece, the same again, and three pieces of 8 tokens
        monkeypatch.setattr(conv, "BACKWARD", conv.Tiling(8, 32, programs))
        monkeypatch.setattr(conv, "FORWARD", conv.Tiling(8, 32, programs))
        results.append(outputs_and_gradients(conv.causal_conv, arguments))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for a, b in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_widths_are_refused() -> None:
    with pytest.raises(InputError, match="d_conv: the triton backend takes 2, 3 or 4, not 5"):
        conv.causal_conv(*conv_arguments(1, 2, 3, 5))
    with pytest.raises(InputError, match="d_conv: the triton backend takes 2, 3 or 4, not 5"):
        conv.neighbour_conv(*conv_arguments(1, 2, 3, 5, initial=False), counted(kept_places(1, 2)))


# Convolution of true neighbours


def kept_places(batch: int, length: int, seed: int = 0) -> Tensor:
    """Positions (B, L), ascending, of ``length`` tokens of a text of half as many again, in runs."""
    generator = torch.Generator().manual_seed(seed + length)
    text = torch.rand(batch, length + length // 2 + 1, generator=generator)
    return text.topk(length, dim=1).indices.sort(dim=1).values


def counted(places: Tensor) -> Tensor:
    """Tokens (B, L) int64 directly before each that were directly before it in the text, all of the run."""
    index = torch.arange(places.shape[1])
    starts = torch.where(places.diff(dim=1, prepend=places[:, :1]) == 1, 0, index)
    return (index - starts.cummax(dim=1).values).to(DEVICE)


@pytest.mark.parametrize(("kept", "n_suffix", "width"), [(1, 0, 4), (1, 3, 2), (5, 7, 4), (300, 0, 3), (250, 20, 4)])
def test_neighbours_are_counted_as_the_reference_counts_them(kept: int, n_suffix: int, width: int) -> None:
    """Also where the last of the context was kept, so that the suffix has neighbours there, and where it was not."""
    places = kept_places(3, kept).to(DEVICE)
    last = int(places.max()) + 1
    for given, n_context in ((places, last), (places, last + 2), (places.mT.contiguous().mT, last)):
        counts = adjacency.true_neighbours(given, n_context, n_suffix, width)
        assert torch.equal(counts, reference.true_neighbours(given, n_context, n_suffix, width))
    torch.library.opcheck(adjacency._count, (places, last, n_suffix, width), test_utils=CHECKS)
    assert counts[:, :kept].equal(counted(places.cpu()).clamp(max=width - 1))


def adjacent(op: Callable, neighbours: Tensor) -> Callable:
    return lambda x, weight, bias: op.neighbour_conv(x, weight, bias, neighbours)


def compare_adjacent(arguments: list[Tensor], neighbours: Tensor, tolerance: float) -> None:
    compare(adjacent(conv, neighbours), adjacent(reference, neighbours), arguments, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (1, 2, 24, 3), (2, 17, 5, 2), (2, 45, 24, 4)], ids=str)
def test_neighbours_equal_reference(nan_memory: None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forty-five tokens are more than one piece, forwards and (in fp32 and fp16) counts are capped at W - 1."""
    arguments = cast(conv_arguments(*shape, initial=False), dtype)
    neighbours = counted(kept_places(*shape[:2]))
    if dtype != torch.bfloat16:
        neighbours = neighbours.clamp(max=shape[3] - 1)
    compare_adjacent(arguments, neighbours, TOLERANCE[dtype])


def test_neighbours_over_pieces_and_in_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKWARD", "ADJACENT"):
        monkeypatch.setattr(conv, name, conv.Tiling(4, 8, 1024))
    x, weight, bias = conv_arguments(2, 21, 6, 4, initial=False)
    neighbours = counted(kept_places(2, 21))
    compare_adjacent([x, weight, bias], neighbours, TOLERANCE[torch.float64])
    columns = [x.mT.contiguous().mT, weight.mT.contiguous().mT, draw(12, seed=1)[::2]]
    compare_adjacent(columns, neighbours.mT.contiguous().mT.int(), TOLERANCE[torch.float64])


@pytest.mark.parametrize("used", [0, 1])
def test_neighbours_when_only_one_output_is_used(used: int) -> None:
    neighbours = counted(kept_places(2, 7))
    fast, slow = (only(used, adjacent(op, neighbours)) for op in (conv, reference))
    compare(fast, slow, conv_arguments(2, 7, 5, 4, initial=False), 1e-12)


def test_with_all_its_neighbours_a_token_is_convolved_as_ever() -> None:
    x, weight, bias = cast(conv_arguments(2, 13, 5, 4, initial=False), torch.float32)
    everyone = torch.arange(13, device=DEVICE).expand(2, -1)
    ours = outputs_and_gradients(adjacent(conv, everyone), [x, weight, bias])
    for mine, plain in zip(ours, outputs_and_gradients(conv.causal_conv, [x, weight, bias]), strict=True):
        assert torch.equal(mine, plain)


def test_strangers_that_are_not_finite_are_not_read() -> None:
    """Neither by the sum nor, where their own gradient is not finite, on the way back."""
    x, weight, bias = cast(conv_arguments(2, 6, 5, 4, initial=False), torch.float32)
    x[:, 2] = float("nan")
    neighbours = torch.tensor([[0, 1, 0, 0, 1, 2]] * 2, device=DEVICE)
    x.requires_grad_()
    out, last = conv.neighbour_conv(x, weight, bias, neighbours)
    (dx,) = torch.autograd.grad(out.sum() + last.sum(), x)
    for tensor in (out, dx):
        assert tensor.isnan().any(2).tolist() == [[False, False, True, False, False, False]] * 2
    assert not last.isnan().any()


# Norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 2, 24), (1, 17, 40), (2, 1, 520)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_norm_equals_reference(nan_memory: None, shape: tuple[int, ...], residual: bool, dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    arguments = cast(norm_arguments(*shape, residual=residual), dtype, wide, dtype)
    compare(normalise(norm.add_rms_norm), normalise(reference.add_rms_norm), arguments, TOLERANCE[dtype])


def keeping(op: Callable, chosen: Tensor, present: int) -> Callable:
    return lambda hidden, residual, weight: op(hidden, residual, chosen, present, weight, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("shape", "kept", "present"), [((2, 9, 5), 4, 6), ((1, 3, 24), 1, 3), ((3, 5, 40), 5, 5)])
@pytest.mark.parametrize("used", [None, 0, 1])
def test_norm_of_kept_tokens_equals_reference(
    nan_memory: None, shape: tuple[int, ...], kept: int, present: int, used: int | None, dtype: torch.dtype
) -> None:
    """Chosen tokens and a suffix behind them or none; gradients of dropped tokens are zeros; both outputs or one."""
    wide = torch.promote_types(dtype, torch.float32)
    drawn = torch.rand(shape[0], present, generator=torch.Generator().manual_seed(kept))
    chosen = drawn.topk(kept).indices.sort().values
    ops = [keeping(op.keep_add_rms_norm, chosen.to(DEVICE), present) for op in (norm, reference)]
    fast, slow = ops if used is None else (only(used, op) for op in ops)
    compare(fast, slow, cast(norm_arguments(*shape), dtype, wide, dtype), TOLERANCE[dtype])


def test_norm_of_kept_tokens_is_that_of_both_steps_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "HELD", 3 * 8)  # three programs with rows of 8
    hidden, residual, weight = cast(norm_arguments(2, 11, 6), torch.bfloat16, torch.float32, torch.float32)
    chosen = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]], device=DEVICE)

    def apart(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(*gather.keep_tokens(*tensors[:2], chosen, 8), tensors[2], 1e-5)

    for slices in ([hidden, residual, weight], [hidden[..., ::2], residual.mT.contiguous().mT[..., ::2], weight[::2]]):
        at_once = outputs_and_gradients(keeping(norm.keep_add_rms_norm, chosen, 8), slices)
        assert all(torch.equal(a, b) for a, b in zip(at_once, outputs_and_gradients(apart, slices), strict=True))


def test_norm_in_mixed_dtypes_follows_the_weight(nan_memory: None) -> None:
    for dtypes in itertools.product((torch.bfloat16, torch.float32), repeat=3):
        arguments = cast(norm_arguments(1, 3, 5), *dtypes)
        compare(normalise(norm.add_rms_norm), normalise(reference.add_rms_norm), arguments, TOLERANCE[torch.bfloat16])


def test_norm_is_for_the_next_product_under_autocast() -> None:
    hidden, residual, weight = cast(norm_arguments(1, 3, 5), torch.bfloat16, torch.float32, torch.float32)
    expected, before = reference.add_rms_norm(hidden, residual, weight, 1e-5)
    with torch.autocast(DEVICE, torch.bfloat16):
        normed, stream = norm.add_rms_norm(hidden, residual, weight, 1e-5)
        double, _ = norm.add_rms_norm(hidden.double(), residual.double(), weight.double(), 1e-5)
    assert normed.dtype == torch.bfloat16 and stream.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(normed, expected.bfloat16())
    torch.testing.assert_close(stream, before, rtol=0, atol=0)


@pytest.mark.parametrize("used", [0, 1])
def test_norm_when_only_one_output_is_used(used: int) -> None:
    fast, slow = (only(used, normalise(op.add_rms_norm)) for op in (norm, reference))
    for residual in (True, False):
        arguments = cast(norm_arguments(2, 3, 5, residual=residual), torch.bfloat16, torch.float32, torch.float32)
        compare(fast, slow, arguments, TOLERANCE[torch.bfloat16])


def test_norm_of_any_layout() -> None:
    hidden, residual, weight = norm_arguments(2, 5, 6)
    slices = draw(2, 5, 12)[:, 1:4, :6], draw(2, 9, 6)[:, 1:4], draw(12)[::2]
    columns = hidden.mT.contiguous().mT, residual[:1].expand(2, -1, -1), weight
    for arguments in (slices, columns, (hidden[0], residual[0], weight), (hidden[:, :0], residual[:, :0], weight)):
        compare(normalise(norm.add_rms_norm), normalise(reference.add_rms_norm), list(arguments), 1e-12)


def test_norm_keeps_the_stream_s_gradient_in_fp32() -> None:
    arguments = cast(norm_arguments(2, 3, 5), torch.bfloat16, torch.float32, torch.float32)
    exact = outputs_and_gradients(normalise(reference.add_rms_norm), [t.double() for t in arguments])
    got = outputs_and_gradients(normalise(norm.add_rms_norm), arguments)
    torch.testing.assert_close(got[3].double(), exact[3], rtol=1e-5, atol=1e-5)


def test_norm_of_more_rows_than_programs(nan_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "HELD", 3 * 8)  # three programs with rows of 8
    compare(normalise(norm.add_rms_norm), normalise(reference.add_rms_norm), norm_arguments(2, 5, 6), 1e-12)
    longer = torch.full((1, 12, 6), float("nan"), dtype=torch.float64, device=DEVICE)  # two rows too many
    longer[:, :10] = 1
    stream = longer[:, :10]
    grads = norm._norm_backward(stream, stream[..., 0].contiguous(), stream[0, 0], stream, stream, stream.dtype, False)
    assert torch.equal(grads[0], stream) and torch.equal(grads[2], torch.full_like(grads[2], 10))
    assert longer[:, 10:].isnan().all()


def test_inputs_stay_as_they_were() -> None:
    hidden, _, weight = norm_arguments(1, 2, 3, residual=False)
    normed, stream = norm.add_rms_norm(hidden, None, weight, 1e-5)
    stream.zero_(), normed.zero_()
    assert torch.equal(hidden, draw(1, 2, 3))
    arguments = conv_arguments(1, 2, 5, 4)
    conv.causal_conv(*arguments)[1].zero_()
    assert all(torch.equal(a, b) for a, b in zip(arguments, conv_arguments(1, 2, 5, 4), strict=True))


# Autograd, tracers, compiler


def test_torchs_contract() -> None:
    leaves = [t.requires_grad_() for t in cast(conv_arguments(2, 3, 5, 4), torch.float32)]
    x, weight, bias, initial = leaves
    torch.library.opcheck(conv._conv, (x, weight, bias, initial), test_utils=CHECKS)
    torch.library.opcheck(conv._conv, (x, weight, bias, None), test_utils=CHECKS)
    neighbours = counted(kept_places(2, 3))
    torch.library.opcheck(conv._conv, (x, weight, bias, None, neighbours), test_utils=CHECKS)
    plain = [t.detach() for t in leaves]
    torch.library.opcheck(conv._conv_backward, (*plain, plain[0].clone(), plain[3].clone()), test_utils=CHECKS)
    torch.library.opcheck(conv._conv_backward, (*plain[:3], None, plain[0].clone(), None), test_utils=CHECKS)
    alone = (*plain[:3], None, plain[0].clone(), plain[3].clone(), neighbours)
    torch.library.opcheck(conv._conv_backward, alone, test_utils=CHECKS)
    hidden, residual, scale = [t.requires_grad_() for t in cast(norm_arguments(2, 3, 5), torch.float32)]
    torch.library.opcheck(norm._norm, (hidden, residual, scale, 1e-5, torch.bfloat16), test_utils=CHECKS)
    torch.library.opcheck(norm._norm, (hidden, None, scale, 1e-5, torch.float32), test_utils=CHECKS)
    stream = residual.detach()
    for later, apart in ((stream.clone(), True), (None, False)):
        saved = (stream, stream[..., 0].clone(), scale.detach(), hidden.detach(), later, torch.bfloat16, apart)
        torch.library.opcheck(norm._norm_backward, saved, test_utils=CHECKS)
    chosen = torch.tensor([[1], [0]], device=DEVICE)
    torch.library.opcheck(norm._norm, (hidden, residual, scale, 1e-5, torch.float32, chosen, 2), test_utils=CHECKS)
    short = stream[:, :2].clone()
    saved = (short, short[..., 0].clone(), scale.detach(), short.clone(), None, torch.bfloat16, True)
    torch.library.opcheck(norm._norm_backward, (*saved, chosen, 2, 3), test_utils=CHECKS)


def test_shapes_without_data() -> None:
    x, weight, bias, initial = (t.to("meta", torch.bfloat16) for t in conv_arguments(2, 7, 5, 4))
    out, last = conv.causal_conv(x, weight, bias, initial)
    assert (out.shape, last.shape, out.dtype) == ((2, 7, 5), (2, 3, 5), torch.bfloat16)
    normed, stream = norm.add_rms_norm(out, None, bias, 1e-5)
    assert (normed.dtype, stream.dtype, stream.shape) == (torch.bfloat16, torch.float32, (2, 7, 5))


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from simba_lab.kernels.gpu import adjacency, conv, conv_kernels, norm

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def check(name, kernel, warps, **arguments):
    signature = {a: "constexpr" if isinstance(v, int) or v is None else v for a, v in arguments.items()}
    signature = {a: signature.get(a, "i32") for a in kernel.arg_names}
    constants = {a: v for a, v in arguments.items() if signature[a] == "constexpr"}
    loose = ("length", "longer", "kept", "present", "span", "rows", "stretch", "eps")  # not known to be multiples of 16
    aligned = [i for i, a in enumerate(kernel.arg_names) if a not in constants and a not in loose]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary["cubin"]), file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True)
    stack = re.findall(r"STACK:(\\d+)", usage.stdout + usage.stderr)
    print(name, *stack, *sorted(set(re.findall(r"(?:ld|st)\\.global(?:\\.v\\d)?\\.b\\d+", binary["ptx"]))))

half, wide = "*bf16", "*fp32"
shape = {"W": 4, "BLOCK": conv.BLOCK}
check("conv-forward", conv_kernels.convolve, 2, x=half, weight=wide, bias=wide, initial=None, neighbours=None, out=half,
      last=half, GROUP=conv.FORWARD.group, **shape)
check("conv-backward", conv_kernels.convolve_backward, 4, x=half, weight=wide, bias=wide, initial=None, neighbours=None,
      dout=half, dlast=None, dx=half, dinitial=None, partial=wide, GROUP=conv.BACKWARD.group, **shape)
check("adjacent-forward", conv_kernels.convolve, 2, x=half, weight=wide, bias=wide, initial=None, neighbours="*i64",
      out=half, last=half, GROUP=conv.ADJACENT.group, **shape)
check("adjacent-backward", conv_kernels.convolve_backward, 4, x=half, weight=wide, bias=wide, initial=None,
      neighbours="*i64", dout=half, dlast=None, dx=half, dinitial=None, partial=wide, GROUP=conv.BACKWARD.group,
      **shape)
check("adjacent-counts", adjacency._count_kernel, 4, positions="*i64", neighbours="*i64", W=4, BLOCK=adjacency.BLOCK)
check("conv-reduce", conv_kernels.add_up, 4, partial=wide, dweight=wide, dbias=wide, W=4, ROWS=32, BLOCK=64)
block, warps = norm.row_layout(2560)
for name, chosen in (("norm", None), ("kept", "*i64")):
    check(f"{name}-forward", norm._forward_kernel, warps, hidden=half, residual=wide, weight=wide, chosen=chosen,
          normed=half, stream=wide, inverse=wide, eps="fp32", BLOCK=block)
    check(f"{name}-backward", norm._backward_kernel, warps, stream=wide, inverse=wide, weight=wide, chosen=chosen,
          dnormed=half, dstream=wide, dhidden=half, dresidual=wide, partial=wide, BLOCK=block)
"""


def test_kernels_compile_for_the_gpu() -> None:
    """For Hopper, without a GPU; the interpreter does not see what the compiler refuses. No spills, wide accesses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {name: accesses for name, *accesses in map(str.split, run.stdout.splitlines())}
    assert {name: accesses[0] for name, accesses in found.items()} == {
        f"{op}-{part}": "0" for op in ("conv", "adjacent", "norm", "kept") for part in ("forward", "backward")
    } | {"conv-reduce": "0", "adjacent-counts": "0"}
    for name in ("conv-forward", "norm-forward", "norm-backward", "kept-forward", "kept-backward"):
        narrow = {access for access in found[name][1:] if not access.endswith("v4.b32")}
        # The inverse rms of a row is a single number, and so is the place it comes from.
        assert narrow <= {"ld.global.b32", "st.global.b32", "ld.global.b64"}, name
