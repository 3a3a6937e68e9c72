"""Projections and norms of the CPU backend against the reference: outputs, gradients, layouts, dtypes, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simba_lab.kernels import cpu, reference
from simba_lab.kernels.cpu import dense, norm_ops

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(got: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Equal to the rounding of ``dtype``, relative to the largest entry of ``truth`` (fp64)."""
    assert got.shape == truth.shape
    assert (got.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max().clamp(min=1e-30)


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum((out * draw(*out.shape, dtype=out.dtype, seed=7)).sum() for out in outputs)
    return list(torch.autograd.grad(loss, leaves))


def leaves_of(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


# Norm


def norm_of(op, tensors: list[Tensor]) -> list[Tensor]:
    hidden, weight, *rest = tensors
    return list(op(hidden, rest[0] if rest else None, weight, 1e-5))


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compiled before memory is poisoned: Numba would otherwise compile the poisoned allocator."""
    for dtype in (torch.float32, torch.float64):
        leaves = leaves_of([draw(1, 2, 3), draw(3)], dtype)
        gradients(norm_of(cpu.add_rms_norm, leaves), leaves)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (1, 127, 33), (2, 64, 64), (3, 43, 65), (1, 257, 8)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_equals_reference(
    compiled: None, nan_memory: None, shape: tuple[int, ...], with_residual: bool, dtype: torch.dtype
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = leaves_of([draw(*shape), draw(shape[-1])], dtype)
    leaves += leaves_of([draw(*shape, seed=3)], wide) if with_residual else []
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outs, truths = norm_of(cpu.add_rms_norm, leaves), norm_of(reference.add_rms_norm, exact)
    assert [out.dtype for out in outs] == [dtype, wide]  # the residual stream stays wide
    for got, truth in zip(outs + gradients(outs, leaves), truths + gradients(truths, exact), strict=True):
        assert_same(got, truth, dtype)


def test_norm_when_only_one_output_is_used() -> None:
    tensors = [draw(2, 9, 7), draw(7), draw(2, 9, 7, seed=3)]
    for used in (0, 1):
        results = []
        for op in (cpu.add_rms_norm, reference.add_rms_norm):
            leaves = leaves_of(tensors, torch.float64)
            out = norm_of(op, leaves)[used]
            results.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
        for got, truth in zip(*results, strict=True):
            torch.testing.assert_close(got if got is not None else torch.zeros(7, dtype=torch.float64),
                                       truth if truth is not None else torch.zeros(7, dtype=torch.float64))  # fmt: skip


def test_norm_is_what_it_says() -> None:
    hidden, residual, weight = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[0.0, 3.0]]]), torch.tensor([2.0, 10.0])
    normed, stream = cpu.add_rms_norm(hidden, residual, weight, 0.0)
    assert stream.tolist() == [[[3.0, 4.0]]]
    torch.testing.assert_close(normed, torch.tensor([[[6.0, 40.0]]]) / 12.5**0.5)
    assert residual.tolist() == [[[0.0, 3.0]]] and hidden.tolist() == [[[3.0, 1.0]]]


def test_norm_of_strided_rows_and_any_number_of_threads() -> None:
    hidden, residual, weight = draw(3, 130, 20)[..., ::2], draw(3, 10, 130, seed=1).mT, draw(20)[::2]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (hidden, weight, residual)]
            outs = norm_of(cpu.add_rms_norm, leaves)
            results.append(outs + gradients(outs, leaves))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = [t.detach().requires_grad_() for t in (hidden, weight, residual)]
    truths = norm_of(reference.add_rms_norm, exact)
    for got, truth in zip(results[0], truths + gradients(truths, exact), strict=True):
        assert_same(got, truth, torch.float64)


@every_dtype
@pytest.mark.parametrize("present", [7, 9])
def test_norm_of_kept_tokens_is_that_of_the_rows_moved_first(
    compiled: None, nan_memory: None, present: int, dtype: torch.dtype
) -> None:
    """Streams of any strides; the gradient of a token that is dropped is 0."""
    chosen = torch.tensor([[0, 3, 6], [1, 2, 6], [4, 5, 6]])
    streams, weight = [draw(3, 9, 10, seed=seed)[..., ::2] for seed in (0, 1)], draw(5)
    leaves = leaves_of([*streams, weight], dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for op, given in ((cpu, leaves), (reference, exact)):
        outs = list(op.keep_add_rms_norm(*given[:2], chosen, present, given[2], 1e-5))
        assert outs[0].shape == outs[1].shape == (3, 3 + 9 - present, 5)
        results.append(outs + gradients(outs, given))
    for got, truth in zip(*results, strict=True):
        assert_same(got, truth, dtype)
    assert results[0][2][0, [1, 2, 4, 5]].abs().sum() == 0


# Projection


@every_dtype
@pytest.mark.parametrize(("shape", "d_out"), [((1, 1, 1), 1), ((2, 3, 5), 7), ((2, 33, 65), 127), ((70, 16), 3)])
def test_projection_equals_the_product(shape: tuple[int, ...], d_out: int, dtype: torch.dtype) -> None:
    leaves = leaves_of([draw(*shape), draw(d_out, shape[-1])], dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, truth = cpu.linear(*leaves), exact[0] @ exact[1].T
    assert out.dtype == dtype
    torch.testing.assert_close(reference.linear(*exact), truth, rtol=1e-13, atol=1e-13)
    for got, expected in zip([out, *gradients([out], leaves)], [truth, *gradients([truth], exact)], strict=True):
        assert_same(got, expected, dtype)


@pytest.mark.parametrize("fast", [True, False])
def test_projection_of_slices_with_and_without_onednn(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(dense, "_has_onednn", lambda: False)
    monkeypatch.setattr(dense, "_is_intel", lambda: False)
    slices = draw(2, 21, 40, dtype=torch.float32).split((3, 20, 17), dim=-1)
    for x in (*slices, slices[1].mT.contiguous().mT, slices[1][:, ::2], slices[1][:1].expand(4, -1, -1)):
        weight = draw(11, 2 * x.shape[-1], dtype=torch.float32)[:, ::2]
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        out, truth = cpu.linear(*leaves), exact[0] @ exact[1].T
        for got, expected in zip([out, *gradients([out], leaves)], [truth, *gradients([truth], exact)], strict=True):
            assert_same(got, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    empty, weight = draw(2, 0, 5, dtype=dtype), draw(3, 5, dtype=dtype)
    assert cpu.linear(empty, weight).shape == (2, 0, 3)
    normed, stream = cpu.add_rms_norm(empty, empty, weight[0], 1e-5)
    assert normed.shape == stream.shape == (2, 0, 5)


# Autograd and tracers


def test_gradcheck_and_torchs_contract() -> None:
    hidden, residual, weight = leaves_of([draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(4)], torch.float64)
    assert torch.autograd.gradcheck(lambda h, r, w: cpu.add_rms_norm(h, r, w, 1e-5), (hidden, residual, weight))
    assert torch.autograd.gradcheck(lambda h, w: cpu.add_rms_norm(h, None, w, 1e-5), (hidden, weight))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for index in (torch.empty(0, dtype=torch.int64), torch.tensor([[0, 2], [4, 5]])):
        torch.library.opcheck(norm_ops._norm, (hidden, residual, weight, 1e-5, index), test_utils=checks)
        torch.library.opcheck(norm_ops._norm, (hidden, None, weight, 1e-5, index), test_utils=checks)
    x, projection = leaves_of([draw(2, 3, 4), draw(5, 4)], torch.float32)
    torch.library.opcheck(dense._linear, (x, projection), test_utils=checks)


@every_dtype
def test_shapes_without_data(dtype: torch.dtype) -> None:
    x, weight = torch.empty(2, 7, 5, dtype=dtype, device="meta"), torch.empty(3, 5, dtype=dtype, device="meta")
    assert cpu.linear(x, weight).shape == (2, 7, 3)
    normed, stream = cpu.add_rms_norm(x, None, weight[0], 1e-5)
    assert normed.dtype == dtype and stream.dtype == torch.promote_types(dtype, torch.float32)
