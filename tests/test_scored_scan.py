"""The CPU scan that scores the context on its way: the scan to the bit, and the impact that the reference computes."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_kernels import inputs
from torch import Tensor

from simba_lab.kernels import cpu, reference, resolve
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import CRITERIA, PruningPlan

REDUCTIONS = ("max", "absmax", "l2")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
READERS = ["global_impact", "banded_impact", "blocks"]


@pytest.fixture(scope="module")
def compiled() -> None:
    """Before memory is poisoned: Numba would otherwise compile the poisoned allocator."""
    for dtype in TOLERANCE:
        s = {name: t.detach().requires_grad_() for name, t in inputs(1, 2, 3, dtype=dtype).items()}
        out, final, _ = cpu.scored_scan(**s, weight=None, present=1, reduce="max")
        (out.sum() + final.sum()).backward()
        exact_impact(s, None, 1, "max")
        cpu.selective_scan(**{name: t.detach() for name, t in s.items()})


def exact_impact(s: dict[str, Tensor], weight: Tensor | None, present: int, reduce: str) -> Tensor:
    s = {name: t.detach().double() for name, t in s.items()}
    tokens = (s["x"][:, :present], s["dt"][:, :present], s["dt_bias"], s["A"], s["B"][:, :present])
    return reference.global_impact(*tokens, s["C"][:, present - 1], None if weight is None else weight.double(), reduce)


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("length", "channels", "states", "present"),
    [(1, 1, 1, 1), (5, 3, 3, 5), (37, 70, 16, 20), (65, 130, 5, 64), (200, 64, 16, 131), (33, 65, 8, 32)],
)
def test_it_is_the_scan_to_the_bit_and_the_reference_s_impact(
    compiled: None, nan_memory: None, length: int, channels: int, states: int, present: int, dtype: torch.dtype
) -> None:
    s = inputs(2, length, channels, states, dtype)
    y, final = cpu.selective_scan(**s)
    for reduce in REDUCTIONS:
        for weight in (None, s["z"][:, present - 1]):
            out, last, scores = cpu.scored_scan(**s, weight=weight, present=present, reduce=reduce)
            assert torch.equal(out, y) and torch.equal(last, final)
            assert scores.shape == (2, present) and scores.dtype == dtype
            assert relative(scores, exact_impact(s, weight, present, reduce)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("raw", [-40.0, -14.0, 3.0, 50.0])
def test_steps_of_any_size(compiled: None, nan_memory: None, raw: float) -> None:
    """Steps of 1e-17 and 1e-6, where nothing is forgotten, and of 3 and 50, where nearly everything is."""
    s = inputs(1, 150, 40, 16, torch.float32)
    s |= {"dt": s["dt"] + raw}
    for reduce in REDUCTIONS:
        *_, scores = cpu.scored_scan(**s, weight=None, present=140, reduce=reduce)
        assert scores.isfinite().all()
        assert relative(scores, exact_impact(s, None, 140, reduce)) <= 5e-6


def test_states_that_vanish_in_some_channels_and_not_in_others(compiled: None) -> None:
    """Far tokens count by what is left of them, however little, until it counts as 0."""
    s = inputs(2, 700, 70, 16, torch.float32)
    s["A"] = -torch.arange(1.0, 17).expand(70, 16).contiguous()
    s["dt_bias"][::7] -= 6
    for reduce in REDUCTIONS:
        *_, scores = cpu.scored_scan(**s, weight=None, present=700, reduce=reduce)
        exact = exact_impact(s, None, 700, reduce)
        torch.testing.assert_close(scores.double(), exact, rtol=1e-3, atol=1e-7 * exact.abs().max().item())


def test_gradients_are_those_of_the_scan_to_the_bit(compiled: None, nan_memory: None) -> None:
    s, results = inputs(2, 45, 33, 6, torch.float32), []
    for op in (cpu.selective_scan, lambda **s: cpu.scored_scan(**s, weight=None, present=40, reduce="l2")):
        leaves = {name: t.detach().requires_grad_() for name, t in s.items()}
        out, final, *scores = op(**leaves)
        results.append(torch.autograd.grad(out.square().sum() + final.sum(), list(leaves.values())))
        assert not any(t.requires_grad for t in scores)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_neither_the_suffix_nor_the_batch_nor_threads_decide(compiled: None) -> None:
    s, before = inputs(3, 90, 200, 16, torch.float32), torch.get_num_threads()
    *_, scores = cpu.scored_scan(**s, weight=None, present=60, reduce="absmax")
    other = {name: t.clone() if name in ("x", "dt", "B", "C", "z") else t for name, t in s.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name][:, 60:] += 1.0
    assert torch.equal(cpu.scored_scan(**other, weight=None, present=60, reduce="absmax")[2], scores)
    alone = {name: t[1:2] if t.dim() == 3 or name == "initial" else t for name, t in s.items()}
    assert torch.equal(cpu.scored_scan(**alone, weight=None, present=60, reduce="absmax")[2], scores[1:2])
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu.scored_scan(**s, weight=None, present=60, reduce="absmax")[2], scores)
    finally:
        torch.set_num_threads(before)


def test_half_precision_is_computed_in_fp32(compiled: None) -> None:
    s = inputs(2, 33, 20, 4, torch.bfloat16)
    out, final, scores = cpu.scored_scan(**s, weight=None, present=30, reduce="max")
    assert (out.dtype, final.dtype, scores.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert relative(scores, exact_impact(s, None, 30, "max")) <= TOLERANCE[torch.float32]


# In the model


class Counting:
    """A backend whose scans are counted; ``fused`` False takes the scan that scores away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fused: bool = True) -> None:
        self.calls: list[str] = []
        real = resolve("numba", "cpu")
        ops = {name: self._counted(name, getattr(real, name)) for name in ("scored_scan", "global_impact")}
        backend = dataclasses.replace(real, **ops if fused else ops | {"scored_scan": None})
        monkeypatch.setattr("simba_lab.model.lm.resolve", lambda name, device: backend)

    def _counted(self, name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return op(*arguments)

        return call


def pruned(criterion: Any) -> LanguageModel:
    lm = LanguageModel(ModelConfig(16, 4, 50)).eval()
    return lm.with_pruning(PruningPlan.build(4, criterion, "linear", final_keep=0.3))


@pytest.mark.parametrize("criterion", READERS)
@pytest.mark.parametrize("n_suffix", [0, 5])
def test_criteria_that_read_the_boundary_s_own_impact_take_what_the_scan_found(
    monkeypatch: pytest.MonkeyPatch, criterion: str, n_suffix: int
) -> None:
    """The same tokens are kept and the same logits come out as by the op that only scores."""
    tokens = torch.randint(50, (3, 37 + n_suffix), generator=torch.Generator().manual_seed(0))
    outputs = []
    for fused in (True, False):
        counting = Counting(monkeypatch, fused)
        with torch.no_grad():
            outputs.append(pruned(criterion)(tokens, n_context=37))
        assert counting.calls == ["scored_scan" if fused else "global_impact"] * 3
    (ours, theirs) = outputs
    assert all(torch.equal(a, b) for a, b in zip(ours.kept, theirs.kept, strict=True))
    assert torch.equal(ours.logits, theirs.logits)


def test_options_reach_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(1))
    for reduce in REDUCTIONS:
        for gated in (False, True):
            kept = []
            for fused in (True, False):
                counting = Counting(monkeypatch, fused)
                spec = {"class_path": "global_impact", "init_args": {"reduce": reduce, "gated": gated}}
                with torch.no_grad():
                    kept.append(pruned(spec)(tokens, n_context=40).kept)
                assert set(counting.calls) == {"scored_scan" if fused else "global_impact"}
            assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_others_leave_the_scan_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counting, tokens = Counting(monkeypatch), torch.zeros(1, 30, dtype=torch.int64)
    with torch.no_grad():
        for criterion in sorted(set(CRITERIA.names()) - set(READERS)):
            pruned(criterion)(tokens, n_context=30)
    assert "scored_scan" not in counting.calls and "global_impact" in counting.calls


# Denormal numbers


@numba.njit
def _product_while_flushed(a: np.ndarray, b: np.ndarray) -> None:
    before = flush_denormals()
    for i in range(a.size):
        a[i] *= b[i]
    restore_denormals(before)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86-64 is told")
def test_denormal_numbers_are_zero_in_kernels_and_nowhere_else() -> None:
    small, factor = np.full(37, 1e-30, np.float32), np.full(37, 1e-10, np.float32)
    flushed = small.copy()
    _product_while_flushed(flushed, factor)
    assert (flushed == 0).all()
    s = inputs(1, 40, 20, 4, torch.float32)
    cpu.scored_scan(**s, weight=None, present=30, reduce="max")
    assert ((small * factor) > 0).all() and (torch.full((5,), 1e-30) * 1e-10 > 0).all()
