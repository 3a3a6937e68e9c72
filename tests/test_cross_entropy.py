"""The fused cross-entropy against torch's in fp64, loss and gradient, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from simba_lab.kernels import reference, resolve

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
# The gradient is rounded to the dtype of the logits once; the loss is fp32 always.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def logits_and_labels(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = (5 * torch.randn(rows, vocabulary, dtype=torch.float64)).to(dtype).to(DEVICE)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[1::3] = IGNORED
    return logits, labels


def expected(logits: Tensor, labels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    scored = labels != IGNORED
    loss = -wide.log_softmax(1)[scored, labels[scored]].sum() / scored.sum()
    (gradient,) = torch.autograd.grad(factor * loss, wide)
    return loss.detach(), gradient


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@needs_triton
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(7, 13), (3, 4096), (4, 4099), (1, 30)])
def test_loss_and_gradient_are_those_of_fp64(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    from simba_lab.kernels.gpu.cross_entropy import cross_entropy

    logits, labels = logits_and_labels(rows, vocabulary, dtype)
    ours = logits.clone().requires_grad_()
    loss = cross_entropy(ours, labels)
    (gradient,) = torch.autograd.grad(3 * loss, ours)
    exact_loss, exact_gradient = expected(logits, labels, 3.0)
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=1e-6)
    assert relative(gradient, exact_gradient) < TOLERANCES[dtype]
    assert not gradient[labels == IGNORED].any()
    assert torch.equal(ours, logits)


@needs_triton
def test_extremes_stay_finite() -> None:
    from simba_lab.kernels.gpu.cross_entropy import cross_entropy

    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, -torch.inf], [-3e38, -3e38, -3e38]], device=DEVICE)
    ours = logits.requires_grad_()
    loss = cross_entropy(ours, torch.tensor([0, 1, 2], device=DEVICE))
    (gradient,) = torch.autograd.grad(loss, ours)
    assert float(loss.detach()) == pytest.approx(torch.log(torch.tensor(3.0)).item() / 3, abs=1e-6)
    assert gradient.isfinite().all() and not gradient[:2].any()


@needs_triton
def test_nothing_scored_is_not_a_number_and_pulls_nowhere() -> None:
    from simba_lab.kernels.gpu.cross_entropy import cross_entropy

    logits = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), IGNORED, device=DEVICE))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isnan() and not gradient.any()


@needs_triton
def test_rows_that_are_views_of_a_wider_tensor() -> None:
    from simba_lab.kernels.gpu.cross_entropy import cross_entropy

    logits, labels = logits_and_labels(5, 24, torch.float32)
    wide = logits.clone().requires_grad_()
    loss = cross_entropy(wide[:, 3:20], labels % 17 - (labels == IGNORED) * (IGNORED % 17 - IGNORED))
    narrow = logits[:, 3:20].contiguous()
    exact, _ = expected(narrow, torch.where(labels == IGNORED, labels, labels % 17), 1.0)
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert not wide.grad[:, :3].any() and wide.grad[:, 3:20].any()


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_every_backend_has_it_and_computes_in_fp32(backend: str) -> None:
    logits, labels = (t.cpu() for t in logits_and_labels(6, 11, torch.bfloat16))
    loss = resolve(backend, "cpu").cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected(logits, labels, 1.0)[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(loss, reference.cross_entropy(logits, labels, IGNORED))
