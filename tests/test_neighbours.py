"""Convolutions of true neighbours: a token whose neighbours are gone is convolved with nothing, not with strangers."""

from __future__ import annotations

import argparse
import itertools

import pytest
import test_mamba2
import torch
from slow_oracle import assert_equal_to_the_oracle, causal_conv, random_tokens, tiny_model
from test_model import close, decoding_equals_one_pass
from torch import Tensor

from simba_lab.cli.pruning_flags import configure_pruning, described_plan
from simba_lab.errors import InputError
from simba_lab.evaluate.arguments import pruning_plan
from simba_lab.evaluate.arms import parse_arm
from simba_lab.kernels import cpu, reference
from simba_lab.model import LanguageModel
from simba_lab.pruning import PruningPlan
from simba_lab.sweep.plan import arm_name

MODELS = {"mamba1": tiny_model, "mamba2": test_mamba2.model}
every_generation = pytest.mark.parametrize("generation", MODELS)


def adjacent(lm: LanguageModel, criterion: str = "norm", final_keep: float = 0.2) -> LanguageModel:
    return lm.sparsified(criterion, "linear", final_keep=final_keep, convolution="adjacent")


def arguments(length: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(length)
    shapes = ((2, length, 3), (3, width), (3,))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)


def counted(places: list[int], width: int) -> Tensor:
    """True neighbours directly before each, by looking; in the second row as far as the convolution reads."""
    found = [next(d for d in itertools.count(1) if place - d not in places) - 1 for place in places]
    return torch.tensor([found, [min(n, width - 1) for n in found]])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("places", [[0, 1, 2, 5, 6, 8, 12, 13, 14, 15, 16], [3, 4, 9], [7], list(range(9))], ids=len)
def test_taps_read_true_neighbours_only(places: list[int], width: int) -> None:
    x, weight, bias = arguments(len(places), width)
    out, last = reference.neighbour_conv(x, weight, bias, counted(places, width))
    expected = torch.stack([causal_conv(row, weight, bias, places) for row in x])
    close(out, expected)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, wanted = (torch.autograd.grad((y * cotangent).sum(), (x, weight, bias)) for y in (out, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        close(ours, theirs)
    for back in range(1, width):
        known = all(places[-1] - distance in places for distance in range(back))
        close(last[:, -back], x[:, -back] if known else torch.zeros(2, 3).double())


def test_a_stranger_that_is_not_finite_is_not_read() -> None:
    x, weight, bias = (t.detach() for t in arguments(5, 4))
    x[:, 1] = float("nan")
    out, _ = reference.neighbour_conv(x, weight, bias, torch.tensor([[0, 1, 0, 1, 2]] * 2))
    assert out.isnan().any(2).tolist() == [[False, True, False, False, False]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 3), (9, 1), (70, 4), (131, 5)])
def test_cpu_kernels_equal_reference(
    request: pytest.FixtureRequest, length: int, width: int, dtype: torch.dtype
) -> None:
    """More tokens than a job has, too; x is half of a wider tensor, and NaN in fresh memory is no input."""
    places = sorted(torch.randperm(2 * length, generator=torch.Generator().manual_seed(length))[:length].tolist())
    known = counted(places, width)
    given = [t.detach().to(dtype).requires_grad_() for t in arguments(length, width)]
    cpu.neighbour_conv(*given, known)[0].sum().backward()  # compiled before memory is poisoned
    request.getfixturevalue("nan_memory")
    results = []
    for op, leaves in ((cpu, given), (reference, [t.detach().double().requires_grad_() for t in given])):
        x, weight, bias = leaves
        outputs = op.neighbour_conv(torch.cat([x, 2 * x], dim=2)[..., 3:], weight, bias, known)
        loss = sum((out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum() for out in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() if ours.numel() else True


@every_generation
@pytest.mark.parametrize("criterion", ["global_impact", "norm"])
@pytest.mark.parametrize("n_context", [1, 14])
def test_pruned_logits_and_gradients_equal_the_slow_oracle(generation: str, criterion: str, n_context: int) -> None:
    sparse = adjacent(MODELS[generation](n_layer=3), criterion)
    assert_equal_to_the_oracle(sparse, criterion, random_tokens(2, n_context + 3), n_context)


@every_generation
@pytest.mark.parametrize("n_context", [2, 13, 20])
def test_one_pass_equals_prefill_and_decoding(generation: str, n_context: int) -> None:
    sparse, tokens = adjacent(MODELS[generation]()), random_tokens(2, n_context + 5)
    with torch.no_grad():
        decoding_equals_one_pass(sparse, tokens, n_context, range(6), (0, 2, 5))


@every_generation
def test_a_kept_run_of_the_newest_tokens_is_as_it_was(generation: str) -> None:
    """Recency leaves nobody without neighbours but the first, who has nothing before it either way."""
    lm, tokens = MODELS[generation](), random_tokens(2, 24)
    runs = [lm.sparsified("recency", "linear", final_keep=0.2, convolution=how) for how in ("compacted", "adjacent")]
    close(*(arm(tokens, n_context=20).logits for arm in runs))
    apart = [lm.sparsified("random", "linear", final_keep=0.2, convolution=how) for how in ("compacted", "adjacent")]
    one, other = (arm(tokens, n_context=20).logits for arm in apart)
    assert (one - other).abs().max() > 1e-3


def test_it_is_kept_named_and_costs_nothing() -> None:
    lm = tiny_model()
    plain, sparse = lm.sparsified("norm", "linear", final_keep=0.2), adjacent(lm)
    assert PruningPlan.from_spec(sparse.pruning.spec()).convolution == "adjacent"
    assert PruningPlan.from_spec({"criterion": "norm", "schedule": "linear"}).convolution == "compacted"
    assert arm_name(sparse.pruning).endswith(":norm+adjacent") and "adjacent" not in arm_name(plain.pruning)
    assert sparse.flops(20, 4).total == plain.flops(20, 4).total
    assert parse_arm("linear:norm@0.6+adjacent", lm).pruning.convolution == "adjacent"
    asked = pruning_plan(sparse, "recency", None, None, None, None, False, {})
    assert asked.convolution == "adjacent", "what is not given is as the model was saved"
    parser = argparse.ArgumentParser()
    configure_pruning(parser.add_argument_group())
    flags = [["--criterion", "norm", "--final-keep", "0.2", *more] for more in ([], ["--convolution", "adjacent"])]
    plans = [described_plan(parser.parse_args(given), lm.config.n_layer) for given in flags]
    assert [plan.convolution for plan in plans] == ["compacted", "adjacent"]


@pytest.mark.parametrize("arm", ["linear:norm@0.6+adjoining", "linear:norm@0.6+"])
def test_another_word_is_refused(arm: str) -> None:
    with pytest.raises(InputError, match="convolution must be one of compacted, adjacent, got '(adjoining)?'"):
        parse_arm(arm, tiny_model())
