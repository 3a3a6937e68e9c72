"""Selection and gather in Triton against their reference: on a CUDA device, or in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from simba_lab.kernels import reference

pytest.importorskip("triton")
from simba_lab.kernels.gpu import gather, select  # noqa: E402 - they need triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def full_of_ties(batch: int, length: int) -> Tensor:
    """A few values, among them NaN, both infinities, both zeros and the smallest and largest numbers."""
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, -1.0]
    choice = torch.randint(len(values), (batch, length), generator=torch.Generator().manual_seed(length))
    return torch.tensor(values)[choice].to(DEVICE)


def assert_selected(scores: Tensor, k: int, protected: int, positions: Tensor | None = None) -> None:
    got = select.select_tokens(scores, k, protected, positions)
    expected = reference.select_tokens(scores, k, protected, positions)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs), (scores.shape, k, protected)


@pytest.mark.parametrize("length", [1, 2, 31, 64, 129, 1000])
def test_selects_what_the_reference_selects(length: int, nan_memory: None) -> None:
    for k in sorted({1, 2, length // 3 + 1, length - 1, length} & set(range(1, length + 1))):
        scores = torch.cat([draw(1, length), full_of_ties(2, length), torch.zeros(1, length, device=DEVICE)])
        for protected in sorted({1, k // 2 + 1}):
            assert_selected(scores, k, protected)


def test_long_sequences_are_read_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of sequences that no program can hold, at lengths that end within a block and at its end."""
    monkeypatch.setattr(select, "HELD", 32)
    monkeypatch.setattr(select, "READ", 32)
    monkeypatch.setattr(select, "WRITTEN", 16)
    for length, k in ((33, 1), (64, 20), (171, 33)):
        positions = (3 * torch.arange(length, device=DEVICE)).expand(2, length)
        scores = torch.cat([draw(1, length), full_of_ties(1, length)])
        assert_selected(scores, k, min(k, 5), positions)


def test_tokens_held_but_written_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "WRITTEN", 16)
    for k in (1, 50, 100):
        assert_selected(full_of_ties(2, 100), k, 1)


def test_positions_come_along() -> None:
    positions = (5 * torch.arange(90, device=DEVICE) + 2).expand(3, 90)
    chosen, at = select.select_tokens(draw(3, 90), 17, 2, positions)
    assert torch.equal(at, 5 * chosen + 2)
    wide = torch.randint(10**12, (3, 180), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert_selected(draw(3, 180)[:, ::2], 30, 1, wide[:, 90:])  # neither contiguous nor at the start of its memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    assert_selected(draw(2, 77).to(dtype), 30, 3)
    close = (1 + 1e-12 * draw(1, 40).double()).to(dtype)  # equal in fp32
    assert_selected(close, 11, 1)


def test_no_sequences() -> None:
    chosen, at = select.select_tokens(torch.empty(0, 5, device=DEVICE), 3, 1)
    assert chosen.shape == at.shape == (0, 3)


# Gather


def streams(batch: int, length: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden in ``dtype``, contiguous; residual in fp32 at least, a slice of a wider tensor."""
    wide = torch.promote_types(dtype, torch.float32)
    residual = draw(batch, length + 1, 2 * channels, seed=1).to(wide)[:, 1:, channels:]
    return draw(batch, length, channels).to(dtype), residual


def indices(batch: int, present: int, k: int) -> Tensor:
    return torch.sort(draw(batch, present, seed=2).argsort(1)[:, :k], dim=1).values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("present", "k", "suffix"), [(1, 1, 0), (9, 4, 0), (9, 4, 3), (6, 6, 2)])
def test_keeps_what_the_reference_keeps(
    dtype: torch.dtype, present: int, k: int, suffix: int, nan_memory: None
) -> None:
    for channels in (1, 37, 64):
        given = [t.requires_grad_() for t in streams(2, present + suffix, channels, dtype)]
        chosen = indices(2, present, k)
        got, expected = (op.keep_tokens(*given, chosen, present) for op in (gather, reference))
        assert [t.dtype for t in got] == [t.dtype for t in given]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        cotangents = [torch.randn_like(t) for t in expected]
        gradients = [torch.autograd.grad(out, given, cotangents) for out in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert gradients[0][0].dtype == dtype


def test_a_gradient_through_one_stream_alone() -> None:
    hidden, residual = streams(1, 5, 8, torch.float32)
    hidden.requires_grad_()
    kept, _ = gather.keep_tokens(hidden, residual, torch.tensor([[1, 4]], device=DEVICE), 5)
    kept.sum().backward()
    assert hidden.grad.sum(-1).tolist() == [[0, 8, 0, 0, 8]]


def test_custom_ops_keep_torchs_contract() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    hidden, residual = (t.requires_grad_() for t in streams(2, 7, 5, torch.float32))
    torch.library.opcheck(gather._keep, (hidden, residual, indices(2, 6, 3), 6), test_utils=checks)
    positions = torch.arange(9, device=DEVICE).expand(2, 9)
    for given in (None, positions):
        torch.library.opcheck(select._select, (draw(2, 9), 4, 1, given), test_utils=checks)


# What only a device shows


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2047, 2048, 16383, 16384, 16385, 70_001])
def test_selects_at_full_length(length: int) -> None:
    scores = draw(3, length)
    for given, k in itertools.product((scores, (scores * 3).round(), full_of_ties(3, length)), (1, length // 2)):
        assert_selected(given, k, 1)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    hidden = torch.empty(3, 300_000, 2560, dtype=torch.bfloat16, device="cuda").random_(0, 100)
    chosen = torch.arange(0, 300_000, 1000, device="cuda").expand(3, -1)
    kept, again = gather.keep_tokens(hidden, hidden, chosen, 300_000)
    assert torch.equal(kept, hidden[:, ::1000]) and torch.equal(kept, again)
