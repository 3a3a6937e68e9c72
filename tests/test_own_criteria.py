"""Criteria of our own against brute force in fp64, in both generations; the rules that all share are tested beside."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from slow_oracle import impact_by_removal, random_tokens, silu, softplus, tiny_model
from test_criteria import signals
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels import cost, resolve
from simba_lab.pruning import CRITERIA, Criterion, ScoredShape, Signals, measure, select_index

HEADS, GROUPS = 4, 2


def build(name: str, **options: Any) -> Criterion:
    return CRITERIA.build({"class_path": name, "init_args": options})


def second_generation(tokens: int = 19, channels: int = 12, states: int = 3, batch: int = 2) -> Signals:
    """The same kind of signals with a step and an A per head, B and C per group."""
    given = signals(batch=batch, tokens=tokens, channels=channels, states=GROUPS * states)
    B, C = given.B.unflatten(-1, (GROUPS, states)), given.C.unflatten(-1, (GROUPS, states))
    per_head = {"dt": given.dt[..., :HEADS], "dt_bias": given.dt_bias[:HEADS], "A": given.A[:HEADS, 0]}
    return dataclasses.replace(given, B=B, C=C, **per_head)


GENERATIONS = {"mamba1": lambda: signals(batch=2, tokens=19, channels=12), "mamba2": second_generation}
every_generation = pytest.mark.parametrize("generation", GENERATIONS)


def left_in_state(given: Signals, row: int, query: Tensor) -> Tensor:
    """(tokens, channels): what ``query`` reads of each token in the boundary's state of one sequence, by removal."""
    delta = softplus(given.dt[row] + given.dt_bias)
    A, B = given.A, given.B[row]
    if given.per_head:
        head = torch.arange(given.x.shape[-1]) // (given.x.shape[-1] // HEADS)
        group = head // (HEADS // GROUPS)
        delta, A, B, query = delta[:, head], A[head][:, None], B[:, group], query[group]
    return impact_by_removal(given.x[row], delta, A.expand(-1, B.shape[-1]), B, query)


def reduced(impact: Tensor, reduce: str) -> Tensor:
    return {"max": impact.amax(-1), "absmax": impact.abs().amax(-1), "l2": impact.square().sum(-1).sqrt()}[reduce]


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# query_impact


@every_generation
@pytest.mark.parametrize("reduce", ["max", "absmax", "l2"])
@pytest.mark.parametrize(("queries", "probes"), [(1, 1), (5, 1), (6, 3), (16, 5), (100, 1), (100, 60)])
def test_query_impact_is_the_strongest_mean_reading(generation: str, queries: int, probes: int, reduce: str) -> None:
    given = GENERATIONS[generation]()
    scores = build("query_impact", queries=queries, probes=probes, reduce=reduce).score(given)
    asked = list(range(19))[-queries:]
    size, longer = divmod(len(asked), min(probes, len(asked)))
    ends = [0, *itertools.accumulate(size + (run < longer) for run in range(min(probes, len(asked))))]
    for row in range(2):
        read = {q: left_in_state(given, row, given.C[row, q]) for q in asked}
        runs = [[read[q] for q in asked[a:b]] for a, b in itertools.pairwise(ends)]
        readings = torch.stack([reduced(sum(run) / len(run), reduce) for run in runs])
        same(scores[row], readings.amax(0))


@every_generation
def test_one_query_is_global_impact(generation: str) -> None:
    given = GENERATIONS[generation]()
    for reduce in ("max", "absmax", "l2"):
        one = build("query_impact", queries=1, reduce=reduce).score(given)
        assert torch.equal(one, build("global_impact", reduce=reduce).score(given))


# output_impact


@every_generation
@pytest.mark.parametrize("gated", [False, True])
def test_output_impact_is_what_the_residual_stream_loses_through_orthogonal_columns(
    generation: str, gated: bool
) -> None:
    given = GENERATIONS[generation]()
    basis, _ = torch.linalg.qr(torch.randn(15, 12, dtype=torch.float64))
    projection = basis * torch.rand(12, dtype=torch.float64)
    given = dataclasses.replace(given, channel_norms=projection.square().sum(0).sqrt())
    scores = {reduce: build("output_impact", reduce=reduce, gated=gated).score(given) for reduce in ("l2", "absmax")}
    for row in range(2):
        lost = left_in_state(given, row, given.C[row, -1]) * (silu(given.z[row, -1]) if gated else 1)
        same(scores["l2"][row], (lost @ projection.T).square().sum(-1).sqrt())
        same(scores["absmax"][row], (lost[:, :, None] * projection.T).square().sum(-1).sqrt().amax(-1))


@pytest.mark.parametrize("shape", [{}, {"layer": "mamba2", "headdim": 3, "ngroups": 2}], ids=["mamba1", "mamba2"])
def test_the_model_says_how_far_a_channel_moves_the_residual_stream(shape: dict[str, Any]) -> None:
    """By feeding the output projection one channel at a time, through the norm's weights where there are any."""
    mixer = tiny_model(**shape).backbone.layers[1].mixer
    units = torch.eye(12, dtype=torch.float64) * (mixer.norm.weight.detach() if shape else 1)
    moved = units @ mixer.out_proj.weight.detach().T
    same(mixer.channel_norms, moved.square().sum(-1).sqrt())


# banded_impact


def band_of(distance: int, first: int) -> tuple[int, int]:
    """Where the band of ``distance`` starts and ends; the first is ``first`` wide, each next twice the last."""
    start, width = 0, first
    while distance >= start + width:
        start, width = start + width, 2 * width
    return start, start + width


@every_generation
@pytest.mark.parametrize(("first", "falloff"), [(1, 0.0), (2, 0.5), (3, 1.0), (16, 1), (50, 0.5)])
def test_banded_impact_ranks_within_bands_of_doubling_width(generation: str, first: int, falloff: float) -> None:
    given = GENERATIONS[generation]()
    scores = build("banded_impact", first=first, falloff=falloff).score(given)
    length = int(given.positions[0, -1]) + 1  # positions 1, 3, ..: every second token is left
    for row in range(2):
        impact = reduced(left_in_state(given, row, given.C[row, -1]), "absmax").tolist()
        bands = [band_of(length - 1 - position, first) for position in given.positions[row].tolist()]
        for t, (start, end) in enumerate(bands):
            better = sum(impact[u] > impact[t] for u in range(19) if bands[u] == bands[t])
            share = (better + 0.5) / (min(end, length) - start)
            assert float(scores[row, t]) == pytest.approx(-share * ((end - start) / first) ** falloff, rel=1e-6)


def kept_by_band(falloff: float, k: int, given: Signals) -> list[int]:
    kept = select_index(build("banded_impact", first=16, falloff=falloff).score(given), k)[0].tolist()
    return [sum(16 * (2**j - 1) <= 1007 - t < 16 * (2 ** (j + 1) - 1) for t in kept) for j in range(6)]


def test_bands_keep_the_share_that_falloff_says() -> None:
    """1008 tokens: bands of 16, 32, .., 512. The boundary belongs to the first."""
    given = signals(batch=1, tokens=1008, channels=2, states=2)
    given = dataclasses.replace(given, positions=torch.arange(1008)[None])
    given.x[:, -1] *= 1e6  # the boundary, which is kept anyhow, is the best of its band
    assert kept_by_band(0, 252, given) == [4, 8, 16, 32, 64, 128]
    assert kept_by_band(1, 60, given) == [10] * 6
    assert kept_by_band(0.5, 100, given) == [6, 8, 12, 17, 24, 33]
    assert kept_by_band(8, 16 + 20, given)[:2] == [16, 20]


def test_bands_do_not_compound_over_layers() -> None:
    """Pruning to 500 and then to 200 keeps what pruning to 200 keeps, while the impacts stay as they are."""
    given = signals(batch=1, tokens=900, channels=2, states=2)
    given = dataclasses.replace(
        given, positions=torch.arange(900)[None], dt_bias=given.dt_bias - 60, dt=0 * given.dt  # nothing decays
    )  # fmt: skip
    criterion = build("banded_impact", first=8, falloff=0.7)
    once = select_index(criterion.score(given), 200)[0]
    left = select_index(criterion.score(given), 500)[0]
    fewer = {name: getattr(given, name)[:, left] for name in ("x", "dt", "B", "C", "z", "hidden", "positions")}
    twice = select_index(criterion.score(dataclasses.replace(given, **fewer)), 200)[0]
    assert torch.equal(left[twice], once)


def test_equal_impacts_rank_the_later_first_and_no_number_last() -> None:
    given = signals(batch=1, tokens=12)
    still = dataclasses.replace(given, x=torch.zeros_like(given.x), positions=torch.arange(12)[None])
    criterion = build("banded_impact", first=100)
    assert select_index(criterion.score(still), 5).tolist() == [[7, 8, 9, 10, 11]]
    still.x[0, 10] = float("nan")
    assert select_index(criterion.score(still), 5).tolist() == [[6, 7, 8, 9, 11]]


# blocks


@every_generation
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_blocks_are_ranked_by_what_their_tokens_are_worth(generation: str, size: int, pool: str) -> None:
    """Positions 1, 3, ..: tokens of a block that are gone do not count."""
    given = GENERATIONS[generation]()
    scores = build("blocks", criterion="norm", size=size, pool=pool).score(given)
    single, boundary = build("norm").score(given), int(given.positions[0, -1])
    block = [(boundary - position) // size for position in given.positions[0].tolist()]
    for row, t in itertools.product(range(2), range(19)):
        of_block = [float(single[row, u]) for u in range(19) if block[u] == block[t]]
        expected = max(of_block) if pool == "max" else sum(of_block) / len(of_block)
        assert float(scores[row, t]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_only_one_block_is_cut(pool: str) -> None:
    """100 tokens from the boundary back in blocks of 8, the oldest of 4: 41 of them are 5 whole blocks and 1 token."""
    given = signals(batch=2, tokens=100, channels=2, states=2)
    given = dataclasses.replace(given, positions=torch.arange(100).expand(2, 100))
    kept = select_index(build("blocks", size=8, pool=pool).score(given), 41)
    for row in kept.tolist():
        sizes = [sum((99 - t) // 8 == block for t in row) for block in range(13)]
        whole = [8] * 12 + [4]
        assert sum(0 < size < full for size, full in zip(sizes, whole, strict=True)) <= 1
        assert sizes[0] == 8 or max(sizes[0], 1) == 1, "the boundary's own block competes like the others"


def test_a_long_context_of_equal_tokens_has_equal_blocks() -> None:
    given = signals(batch=1, tokens=4096, channels=2, states=2, dtype=torch.float32)
    given = dataclasses.replace(given, hidden=torch.full((1, 4096, 5), 0.1))
    scores = build("blocks", criterion="norm", size=7).score(given)
    torch.testing.assert_close(scores, build("norm").score(given), rtol=1e-6, atol=0)


# What all of them must be

OPTIONS = [
    ("query_impact", {}), ("query_impact", {"queries": 6, "probes": 4, "reduce": "l2"}), ("output_impact", {}),
    ("output_impact", {"reduce": "max", "gated": True}), ("banded_impact", {}), ("banded_impact", {"reduce": "l2"}),
    ("blocks", {"size": 8}), ("blocks", {"size": 4, "pool": "max"}),
]  # fmt: skip
every_criterion = pytest.mark.parametrize(("name", "options"), OPTIONS)
SHAPES = [ScoredShape(tokens, 9, 12, 5) for tokens in (1, 2, 5, 40)] + [ScoredShape(40, 9, 12, 5, 4, 2)]


@every_criterion
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.n_tokens}-{shape.n_heads}")
def test_the_closed_form_charges_what_runs(name: str, options: dict, shape: ScoredShape, monkeypatch: Any) -> None:
    """As a user's criterion is counted: on the meta device, so that none waits for data or depends on it.

    A sort costs as much as selection, and the norms of the output's columns, which are a signal, are charged on top.
    """
    blank, norms = measure.meta_signals, torch.empty(shape.d_inner, device="meta")
    monkeypatch.setattr(measure, "meta_signals", lambda of: dataclasses.replace(blank(of), channel_norms=norms))
    criterion, tokens = build(name, **options), shape.n_tokens
    expected = measure.measured_flops(criterion, shape)
    if name == "banded_impact":
        expected += 2 * (cost.select(tokens) - tokens)
    if name == "blocks":
        expected += (1 if "pool" in options else 2) * tokens * (tokens.bit_length() - 1)
    if name == "output_impact":
        expected += 2 * 9 * 12 + (2 * 12 if shape.n_heads else 0)
    assert criterion.flops(shape) == expected


@every_criterion
@every_generation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_runs_than_is_charged(generation: str, name: str, options: dict, dtype: torch.dtype) -> None:
    """As training and sweeps check it, on real numbers; the step sizes of Mamba-2 belong to its impact."""
    given = GENERATIONS[generation]()
    half = {name: getattr(given, name).to(dtype) for name in ("x", "dt", "dt_bias", "B", "C", "z", "hidden")}
    given = dataclasses.replace(given, **half, A=given.A.float(), channel_norms=given.channel_norms.float())
    assert measure.check_measured(build(name, **options), given).shape == given.positions.shape


@pytest.mark.parametrize(("name", "options"), OPTIONS[1::2])
def test_kept_tokens_do_not_change_with_batch_or_suffix(name: str, options: dict) -> None:
    lm = tiny_model(dtype=torch.float32)
    sparse = lm.sparsified({"class_path": name, "init_args": options}, final_keep=0.1)
    tokens = random_tokens(4, 40)
    kept = sparse(tokens, n_context=33).kept
    for order in ([2], [3, 0], [1, 1, 2]):
        other = sparse(torch.cat([tokens[order, :33], tokens[order, 35:]], dim=1), n_context=33).kept
        assert all(torch.equal(a, b[order]) for a, b in zip(other, kept, strict=True))


@every_generation
@every_criterion
def test_the_gpu_kernels_take_what_they_are_given(name: str, options: dict, generation: str) -> None:
    """In Triton's interpreter: signals in bf16, slices of wider tensors, queries and weights in fp32."""
    gpu = pytest.importorskip("simba_lab.kernels.gpu.impact"), pytest.importorskip("simba_lab.kernels.gpu.ssd_scores")
    given = GENERATIONS[generation]()
    half = {key: getattr(given, key).bfloat16() for key in ("x", "dt", "B", "C", "z")}
    wide = {key: getattr(given, key).float() for key in ("dt_bias", "A", "channel_norms")}
    backend = dataclasses.replace(
        resolve("reference", "cpu"), global_impact=gpu[0].global_impact, ssd_impact=gpu[1].ssd_impact
    )
    criterion = build(name, **options)
    fast = criterion.score(dataclasses.replace(given, backend=backend, **half, **wide))
    exact = {key: value.double() for key, value in half.items()}
    slow = criterion.score(dataclasses.replace(given, backend=resolve("reference", "cpu"), **exact))
    assert fast.dtype == torch.float32
    assert (fast.double() - slow).norm() <= 2e-3 * slow.norm()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("query_impact", {"queries": 0}, "queries must be an integer of at least 1, got 0"),
        ("query_impact", {"queries": 4, "probes": 5}, "probes must be at most queries, got 5 of 4"),
        ("query_impact", {"probes": True}, "probes must be an integer"),
        ("query_impact", {"reduce": "mean"}, "query_impact: reduce must be max, absmax or l2"),
        ("output_impact", {"reduce": "l1"}, "output_impact: reduce must be"),
        ("banded_impact", {"first": 2.5}, "first must be an integer"),
        ("banded_impact", {"falloff": -0.1}, "falloff must lie in [0, 8], got -0.1"),
        ("banded_impact", {"falloff": "half"}, "falloff must lie"),
        ("blocks", {"size": 0}, "size must be an integer of at least 1, got 0"),
        ("blocks", {"pool": "sum"}, "pool must be mean or max, got 'sum'"),
        ("blocks", {"criterion": "no_such"}, "no_such"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict, says: str) -> None:
    with pytest.raises(InputError) as caught:
        build(name, **options)
    assert says in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_kernels_cost_inside_a_criterion_what_a_cpus_cost(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from simba_lab.kernels import cpu
    from simba_lab.kernels.gpu.impact import global_impact

    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(2, *size, generator=g).to(device, dtype) for size in ((9, 6), (9, 6), (9, 4), (4,)))
    dt_bias, A = torch.zeros(6, device=device), -torch.ones(6, 4, device=device)
    gate = torch.randn(2, 6, generator=g).to(device, dtype)
    counted = []
    for op, place in ((global_impact, device), (cpu.global_impact, "cpu")):
        for gated in (None, gate):
            inputs = [t if t is None else t.to(place) for t in (x, dt, dt_bias, A, B, C, gated)]
            with measure.OperationCounter() as counter:
                op(*inputs)
            counted.append(counter.flops)
    assert counted[:2] == [cost.global_impact(18, 6, 4, gated, "max") for gated in (False, True)]
    assert counted[2] >= counted[0] and counted[3] >= counted[1], "the CPU's op does a little beside itself"


def test_a_kernel_without_a_cost_is_named() -> None:
    with measure.OperationCounter(), pytest.raises(InputError, match="linear has no stated cost inside a criterion"):
        resolve("numba", "cpu").linear(torch.ones(2, 3), torch.ones(4, 3))


def test_every_kernel_a_criterion_may_call_has_a_cost() -> None:
    names = {name.removesuffix("_triton") for name in measure._OURS}
    assert names == {"causal_conv", "selective_scan", "global_impact", "ssd", "ssd_impact"}
    assert {f"{name}_triton" for name in names} <= measure._OURS.keys()
