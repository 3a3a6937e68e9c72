"""Selection: two independent ways name the same tokens; order, ties and protection are as stated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_oracle import keep_best

from simba_lab.pruning import select_index, select_mask
from simba_lab.pruning.select import protected_count

FEW_VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, float("nan"), float("inf"), float("-inf"), 1e-45, -3e38])


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, float]:
    """Scores (B, L) full of ties, k, protect_recent."""
    length = draw(st.integers(1, 12))
    rows = st.lists(FEW_VALUES | st.floats(-2, 2, width=32), min_size=length, max_size=length)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scores = torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)), dtype=dtype)
    return scores, draw(st.integers(1, length)), draw(st.sampled_from([0.0, 0.1, 0.34, 0.5, 1.0]))


@given(cases())
def test_mask_and_index_name_the_same_tokens(case: tuple[torch.Tensor, int, float]) -> None:
    scores, k, protect = case
    index = select_index(scores, k, protect)
    mask = select_mask(scores, k, protect)
    assert index.shape == (len(scores), k) and index.dtype == torch.int64
    assert mask.shape == scores.shape and mask.dtype == torch.bool
    for row, chosen in zip(mask, index, strict=True):
        assert row.nonzero().flatten().tolist() == chosen.tolist()


@given(cases())
def test_order_is_ascending_and_the_newest_are_kept(case: tuple[torch.Tensor, int, float]) -> None:
    scores, k, protect = case
    length, newest = scores.shape[1], protected_count(k, protect)
    for chosen in select_index(scores, k, protect).tolist():
        assert chosen == sorted(set(chosen))
        assert chosen[-newest:] == list(range(length - newest, length))


@given(cases())
def test_the_rest_are_the_best_with_ties_to_the_later(case: tuple[torch.Tensor, int, float]) -> None:
    scores, k, _ = case
    finite = torch.where(scores.isnan(), -torch.inf, scores)
    expected = [keep_best(row, k) for row in finite.tolist()]
    assert select_index(scores, k).tolist() == expected


@given(cases(), st.integers(0, 2))
def test_a_sequence_is_selected_alone_as_in_a_batch(case: tuple[torch.Tensor, int, float], row: int) -> None:
    scores, k, protect = case
    row = row % len(scores)
    assert torch.equal(select_index(scores, k, protect)[row], select_index(scores[row : row + 1], k, protect)[0])


def test_exact_cases() -> None:
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0]])
    assert select_index(scores, 1).tolist() == [[4]]
    assert select_index(scores, 2).tolist() == [[2, 4]]
    assert select_index(scores, 3).tolist() == [[0, 2, 4]]
    assert select_index(scores, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert select_index(scores, 3, protect_recent=0.67).tolist() == [[2, 3, 4]]
    assert select_index(torch.zeros(1, 6), 3).tolist() == [[3, 4, 5]]


def test_nan_loses_and_infinity_does_not_push_the_boundary_out() -> None:
    scores = torch.tensor([[float("nan"), -5.0, float("inf"), float("inf"), float("-inf")]])
    assert select_index(scores, 2).tolist() == [[3, 4]]
    assert select_index(scores, 4).tolist() == [[1, 2, 3, 4]]


def test_long_rows_with_many_ties() -> None:
    scores = torch.randint(5, (3, 2049), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 7, 1024, 2048, 2049):
        index = select_index(scores, k)
        assert index.tolist() == [keep_best(row, k) for row in scores.tolist()]


def test_selection_carries_no_gradient_and_leaves_the_scores_alone() -> None:
    scores = torch.randn(2, 5, requires_grad=True)
    before = scores.detach().clone()
    assert not select_index(scores, 3).requires_grad and not select_mask(scores, 3).requires_grad
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize(
    ("k", "share", "count"), [(10, 0.0, 1), (10, 0.3, 3), (100, 0.29, 29), (10, 1.0, 10), (1, 0.9, 1), (7, 0.5, 3)]
)
def test_protected_count(k: int, share: float, count: int) -> None:
    assert protected_count(k, share) == count


@pytest.mark.parametrize("k", [0, 6, -1])
def test_a_count_that_does_not_fit_raises(k: int) -> None:
    with pytest.raises(ValueError, match=f"keep {k} of 5"):
        select_index(torch.zeros(1, 5), k)
    with pytest.raises(ValueError, match=f"keep {k} of 5"):
        select_mask(torch.zeros(1, 5), k)
