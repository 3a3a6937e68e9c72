"""The Triton kernels of ``global_impact`` against the reference in fp64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import reference

pytest.importorskip("triton")
from simba_lab.kernels.gpu import impact  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest error allowed, in the norm of all scores. The design asks for 1e-4 in fp32 and 1e-2 in half precision.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
# (batch, length, channels, states)
SHAPES = (
    (1, 1, 1, 1), (3, 2, 5, 3), (2, 17, 24, 4), (1, 63, 40, 16), (2, 64, 5, 4), (1, 65, 72, 3), (1, 130, 24, 16),
    (1, 130, 72, 1), (1, 140, 64, 17),
)  # fmt: skip


def signals(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float32, slowest: float = 1e-3
) -> dict[str, Tensor]:
    """Steps as a Mamba has them at its start: log-uniform per channel in [slowest, 0.1]. Slices of wider tensors."""
    generator = torch.Generator().manual_seed(1000 * length + 10 * channels + states)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    size = torch.exp(torch.rand(channels, generator=generator) * math.log(0.1 / slowest)) * slowest
    x, _ = torch.nn.functional.silu(draw(batch, length, 2 * channels)).to(dtype).chunk(2, dim=-1)
    wide = draw(batch, length, 3 + 2 * states).to(dtype)
    drawn = {
        "x": x,
        "dt": (0.3 * draw(batch, length, channels)).to(dtype),
        "dt_bias": size + torch.log(-torch.expm1(-size)),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": wide[..., 3 : 3 + states],
        "C_boundary": wide[:, -1, 3 + states :],
        "gate": draw(batch, 2 * channels).to(dtype)[:, channels:],
    }
    return {name: value.to(DEVICE) if DEVICE == "cuda" else value for name, value in drawn.items()}


def error(got: Tensor, truth: Tensor) -> float:
    assert got.shape == truth.shape and got.dtype == torch.float32
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def exact(s: dict[str, Tensor], reduce: str = "max") -> Tensor:
    return reference.global_impact(**{name: value.double() for name, value in s.items()}, reduce=reduce)


def by_kernel(s: dict[str, Tensor], reduce: str = "max", series: bool = True) -> Tensor:
    """The custom op itself, whose callers cannot choose between series and exponentials."""
    return impact._impact(**{"gate": None, **s}, reduce=reduce, series=series)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, nan_memory: None) -> None:
    s = signals(*shape, dtype)
    ungated = {name: value for name, value in s.items() if name != "gate"}
    for reduce in impact.REDUCTIONS[: 1 if dtype == torch.float16 else 3]:
        arguments = s if reduce == impact.REDUCTIONS[shape[1] % 3] else ungated
        assert error(impact.global_impact(**arguments, reduce=reduce), exact(arguments, reduce)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("reduce", impact.REDUCTIONS)
def test_every_reduction_with_and_without_gate(reduce: str, nan_memory: None) -> None:
    s = signals(2, 70, 40, 4)
    assert error(impact.global_impact(**s, reduce=reduce), exact(s, reduce)) <= 1e-5
    del s["gate"]
    assert error(impact.global_impact(**s, reduce=reduce), exact(s, reduce)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [0.0, 1e-6, 50.0])
def test_extreme_steps(step: float, dtype: torch.dtype) -> None:
    s = signals(1, 130, 24, 3, dtype)
    s["dt_bias"].zero_()
    raw = {0.0: -200.0, 1e-6: math.log(1e-6), 50.0: 50.0}[step]
    s["dt"] = torch.where(torch.rand(s["dt"].shape, device=DEVICE) < 0.5, raw, s["dt"].float()).to(dtype)
    scores = impact.global_impact(**s, reduce="absmax")
    assert scores.isfinite().all()
    assert error(scores, exact(s, "absmax")) <= TOLERANCE[dtype]
    s["dt"].fill_(raw)  # and all at once
    scores = impact.global_impact(**s, reduce="l2")
    assert scores.isfinite().all() and error(scores, exact(s, "l2")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_whose_decay_vanished_score_zero(dtype: torch.dtype, nan_memory: None) -> None:
    s = signals(1, 200, 5, 3, dtype)
    s["dt_bias"].fill_(3.0)  # steps near 3: after 64 tokens exp(-192) is left of the slowest state
    for reduce in impact.REDUCTIONS:
        scores = impact.global_impact(**s, reduce=reduce)
        assert (scores[:, :100] == 0).all() and (scores[:, -1] != 0).all()
        assert error(scores, exact(s, reduce)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("channels", [5, 64, 65])
def test_largest_of_negative_impacts(channels: int) -> None:
    """Places without a channel must not offer a 0."""
    s = signals(1, 66, channels, 3, torch.bfloat16)
    s["x"], s["B"], s["C_boundary"], s["gate"] = s["x"].abs() + 0.1, s["B"].abs(), -s["C_boundary"].abs(), None
    got = by_kernel(s)
    assert (got < 0).all()
    s.pop("gate")
    assert error(got, exact(s)) <= 2e-3  # the impact nearest to 0 is the one with the largest relative error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_scores_the_same_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    s = signals(2, 70, 72, 4, dtype)
    per_sequence = ("x", "dt", "B", "C_boundary", "gate")
    s["dt"][0] += 3  # the first sequence takes exponentials where the others take the series
    for reduce in ("max", "l2"):
        together = impact.global_impact(**s, reduce=reduce)
        for i in range(2):
            alone = {name: value[i : i + 1] if name in per_sequence else value for name, value in s.items()}
            assert torch.equal(impact.global_impact(**alone, reduce=reduce)[0], together[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", impact.REDUCTIONS)
def test_nan_is_not_hidden(reduce: str, dtype: torch.dtype) -> None:
    s = signals(2, 50, 65, 2, dtype)
    clean = impact.global_impact(**s, reduce=reduce)
    s["x"][0, 40, 64] = float("nan")
    scores = impact.global_impact(**s, reduce=reduce)
    assert scores[0, 40].isnan() and scores.isnan().sum() == 1
    assert torch.equal(scores[1], clean[1])
    s["dt"][1, 49, 2] = float("nan")  # a step that nobody knows makes every earlier decay unknown
    assert impact.global_impact(**s, reduce=reduce)[1].isnan().all()


def test_series_is_used_away_from_the_boundary_and_exponentials_beside_it() -> None:
    s = signals(1, 200, 24, 16, torch.bfloat16)
    series, exponentials = by_kernel(s, "l2"), by_kernel(s, "l2", series=False)
    assert error(series, exact(s, "l2")) <= 3e-5 and error(exponentials, exact(s, "l2")) <= 1e-5
    # Far tokens differ in the last bits only because they were computed in another way.
    assert not torch.equal(series[:, :72], exponentials[:, :72])
    s["dt_bias"].fill_(-2.0)
    s["dt"].zero_()
    assert error(by_kernel(s, "l2")[:, -64:], exact(s, "l2")[:, -64:]) <= 1e-4


@pytest.mark.parametrize("rate", [1.0, 6.0, 16.0, 64.0])
def test_series_error_stays_below_the_stated_bound(rate: float) -> None:
    """One channel, one state, equal steps: the second chunk has the largest share that the series may take (2 / 3)."""
    s = signals(1, 128, 1, 1, torch.bfloat16)
    step = rate / 96  # of a state with A = -1: ``rate`` is its exponent in the middle of the second chunk
    s["dt"].zero_()
    s["dt_bias"].fill_(math.log(math.expm1(step)))
    s["x"].fill_(1)
    s["B"].fill_(1)
    s["C_boundary"].fill_(1)
    s.pop("gate")
    decay, truth = by_kernel(s).double() / step, exact(s) / step
    assert (decay - truth)[0, :64].abs().max() <= 4e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stretches_of_a_sequence_fit_together(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, nan_memory: None
) -> None:
    s = signals(1, 330, 24, 3, dtype)
    cut = {}
    for programs in (1, 2, 128):
        monkeypatch.setattr(impact, "PROGRAMS", programs)
        cut[impact._stretches(330, 24)] = impact.global_impact(**s)
    assert sorted(cut) == [(1, 6), (2, 3), (6, 1)]
    for scores in cut.values():
        assert error(scores, exact(s)) <= TOLERANCE[dtype]


def test_inputs_of_any_stride_and_no_tokens() -> None:
    s = signals(2, 20, 24, 3)
    expected = impact.global_impact(**s)
    for name in ("x", "dt", "B"):
        s[name] = s[name].mT.contiguous().mT
    s["A"], s["gate"] = s["A"].mT.contiguous().mT, s["gate"].mT.contiguous().mT
    assert torch.equal(impact.global_impact(**s), expected)
    for name in ("x", "dt", "B"):
        s[name] = s[name][:, :0]
    assert impact.global_impact(**s).shape == (2, 0)


def test_operation_is_well_formed_and_names_the_reductions() -> None:
    s = signals(2, 20, 5, 3)
    torch.library.opcheck(impact._impact, (*s.values(), "max", False))
    with pytest.raises(InputError, match="reduce: must be one of max, absmax, l2, got 'mean'"):
        impact.global_impact(**s, reduce="mean")
    s["x"].requires_grad_()
    assert not impact.global_impact(**s).requires_grad
