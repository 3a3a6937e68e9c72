"""The ledger cannot lie: whatever is altered between plan and results is caught, and the message names it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from slow_oracle import random_tokens, tiny_model
from torch import Tensor, nn

from simba_lab.budget import (
    Arm,
    Budget,
    CostMismatch,
    PrunedArm,
    UncountedOperation,
    check_evidence,
    check_realised,
    match,
    refuse_altered,
    seal,
    verify,
)
from simba_lab.data import EvalWindows
from simba_lab.errors import AlteredRecord, BudgetMismatch, InputError
from simba_lab.evaluate.windows import score_windows
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import Criterion, PruningPlan, Signals, build_schedule
from simba_lab.pruning.schedules import Linear

SHAPE = ModelConfig(d_model=8, n_layer=4, vocab_size=21, d_state=3)


def windows(count: int = 4, n_context: int = 24, n_suffix: int = 4) -> EvalWindows:
    tokens = random_tokens(count, n_context + n_suffix) % SHAPE.vocab_size
    occurrence = torch.full((count, n_suffix), -1).numpy()
    return EvalWindows(tokens, np.arange(count), n_context, np.ones(count, int), occurrence)


def pruned(criterion: Any = "norm", **options: Any) -> LanguageModel:
    schedule = options or {"final_keep": 0.3}
    return LanguageModel(SHAPE, seed=1, backend="reference").sparsified(criterion, "linear", **schedule)


def planned(final_keep: float = 0.3) -> tuple[PrunedArm, Budget]:
    plan = PruningPlan.build(4, "norm", "linear", final_keep=final_keep)
    arm = PrunedArm("mine", SHAPE, 24, 4, plan)
    return arm, Budget.of(arm, 0.05)


def test_what_is_untouched_passes() -> None:
    arm, budget = planned()
    solutions = match([arm], budget)
    scores = score_windows(LanguageModel(SHAPE, solutions[0].arm.plan, "reference", seed=1), windows(), 2)
    check_realised(solutions, {"mine": scores.flops}, budget)


def test_a_schedule_changed_after_planning() -> None:
    arm, budget = planned()
    solutions = match([arm], budget)
    schedule = solutions[0].arm.plan.schedule
    schedule.final_keep = 0.9
    scores = score_windows(LanguageModel(SHAPE, solutions[0].arm.plan, "reference", seed=1), windows(), 2)
    named = r"mine: ran .* were planned: its schedule was changed, from \[24, .* to \[24, 23"
    with pytest.raises(BudgetMismatch, match=named):
        check_realised(solutions, {"mine": scores.flops}, budget)


class Loosening(Criterion):
    """Changes the schedule that decides how many of its tokens are kept."""

    schedule: Linear

    def score(self, signals: Signals) -> Tensor:
        if signals.x.device.type != "meta":
            self.schedule.final_keep = 0.95
        return signals.x.sum(-1)


def test_a_criterion_that_makes_more_be_kept() -> None:
    criterion = Loosening()
    criterion.schedule = build_schedule("linear", final_keep=0.3)
    model = LanguageModel(SHAPE, PruningPlan(criterion, criterion.schedule), "reference", seed=1)
    budget = Budget(model.flops(24, 4).total)
    solutions = match([Arm("mine", SHAPE, 24, 4, model.pruning)], budget)
    scores = score_windows(model, windows(), 2)
    with pytest.raises(BudgetMismatch, match="mine: ran .* were planned: its schedule was changed"):
        check_realised(solutions, {"mine": scores.flops}, budget)


class Wavering(Linear):
    """A schedule that keeps more at every other question."""

    asked = 0

    def counts(self, n_layers: int, n_context: int) -> list[int]:
        self.asked += 1
        counts = super().counts(n_layers, n_context)
        return [min(counts[0], count + self.asked % 2) for count in counts]


def test_a_schedule_that_changes_its_mind() -> None:
    plan = PruningPlan.build(4, "norm", Wavering(final_keep=0.3))
    model = LanguageModel(SHAPE, dataclasses.replace(plan, schedule=Wavering(0.3)), "reference", seed=1)
    with pytest.raises(BudgetMismatch, match="did not cost the same in every window: the schedule changed"):
        score_windows(model, windows(3), 1)


class Underpriced(Criterion):
    """States no cost for the product it executes."""

    op = "underpriced"

    def score(self, signals: Signals) -> Tensor:
        return torch.matmul(signals.x, signals.x.new_ones(signals.x.shape[-1], 3)).sum(-1)

    def flops(self, shape: Any) -> int:
        return 0


class TwoFaced(Criterion):
    """Cheap where its cost is measured, dear where it runs."""

    def score(self, signals: Signals) -> Tensor:
        x = signals.x
        return x[..., 0] if x.device.type == "meta" else (x @ x.transpose(1, 2)).sum(-1)


def test_a_criterion_whose_operations_nobody_counts() -> None:
    with pytest.raises(UncountedOperation, match=r"ran in scores.0 and has no cost"):
        verify(pruned(Underpriced()), 24, 4)
    with pytest.raises(InputError, match=r"TwoFaced: executed [\d,]+ FLOPs in layer 0, but is charged 0"):
        score_windows(pruned(TwoFaced()), windows(), 2)


class Understated(Criterion):
    op = "vector_norm"

    def score(self, signals: Signals) -> Tensor:
        return torch.linalg.vector_norm(signals.hidden, dim=-1)

    def flops(self, shape: Any) -> int:
        return shape.n_tokens


def test_a_cost_stated_too_low() -> None:
    with pytest.raises(CostMismatch, match="score in layer 0: closed form 24 FLOPs, fvcore 384 FLOPs"):
        verify(pruned(Understated()), 24, 4)


def compiled_layer(model: LanguageModel) -> None:
    model.backbone.layers[1] = torch.compile(model.backbone.layers[1])


def compiled_in_place(model: LanguageModel) -> None:
    model.backbone.layers[1].compile()


def hooked(model: LanguageModel) -> None:
    model.backbone.layers[2].mixer.register_forward_hook(lambda module, given, output: None)


def replaced_forward(model: LanguageModel) -> None:
    model.lm_head.forward = lambda hidden, backend: hidden @ model.lm_head.weight.T


def another_module(model: LanguageModel) -> None:
    model.backbone.norm_f = nn.LayerNorm(8)


def another_shape(model: LanguageModel) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(7, 8))


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (compiled_layer, r"model.backbone.layers.1 is compiled \(OptimizedModule\)"),
        (compiled_in_place, r"model.backbone.layers.1 is compiled \(Block\)"),
        (hooked, "model.backbone.layers.2.mixer has forward hooks, whose work nobody counts"),
        (replaced_forward, "model.lm_head is a Projection, not what its config describes"),
        (another_module, "model.backbone.norm_f is a LayerNorm, not what its config describes"),
        (another_shape, r"model.lm_head.weight has shape \(7, 8\), not what its config describes"),
    ],
)
def test_a_model_that_runs_something_else(alter: Callable[[LanguageModel], None], named: str) -> None:
    model = pruned()
    refuse_altered(model)
    alter(model)
    for use in (lambda: score_windows(model, windows(), 2), lambda: verify(model, 24, 4)):
        with pytest.raises(InputError, match=named):
            use()


def test_a_compiled_model_as_a_whole() -> None:
    with pytest.raises(InputError, match=r"model is compiled \(OptimizedModule\)"):
        score_windows(torch.compile(pruned()), windows(), 2)


@pytest.mark.parametrize(("key", "first", "other"), [("protocol", "suffix", "full"), ("head", "scored", "all")])
def test_arms_that_are_not_counted_alike(key: str, first: str, other: str) -> None:
    arms = [Arm("one", SHAPE, 24, 4), Arm("two", SHAPE, 24, 4, **{key: other})]
    with pytest.raises(BudgetMismatch, match=f"one has {key} {first} and two has {key} {other}; one comparison"):
        match(arms, Budget(arms[0].flops, 0.9))


def test_protocol_full_is_charged_for_what_it_runs() -> None:
    from simba_lab.kernels.cost import Ledger, recording

    model = tiny_model(dtype=torch.float32).sparsified("norm", "linear", final_keep=0.3)
    with torch.no_grad(), recording(Ledger()) as ledger:
        model(random_tokens(1, 25), protocol="full")
    assert ledger.total == Arm("full", model.config, 21, 4, model.pruning, protocol="full").flops


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two arms."""
    lab = tiny.lab(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("finished")
    arms = [tiny.SWEEP["arms"][0], {"schedule": "linear", "criterion": "norm"}]
    assert tiny.simba_lab("sweep", "--config", lab.sweep(folder / "s.yaml", {"arms": arms, "windows": 4})) == 0
    return folder / "s"


def edit(key: str, value: Any) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, results: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        place: Any = results
        for parent in parents:
            place = place[int(parent) if parent.isdecimal() else parent]
        place[last] = value(place.get(last)) if callable(value) else value

    return change


def edit_ledger(key: str, value: Callable[[Any], Any]) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, results: dict[str, Any]) -> None:
        path = folder / results["arms"][1]["run"] / "arm.json"
        record = json.loads(path.read_text())
        edit(key, value)(folder, record)
        path.write_text(json.dumps(record))

    return change


def edit_likelihoods(folder: Path, results: dict[str, Any]) -> None:
    path = folder / results["arms"][1]["run"] / "nll.npy"
    np.save(path, np.load(path) - 0.1)


def without_seal(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.seal.json").unlink()


def resealed(folder: Path, results: dict[str, Any]) -> None:
    """A better number, and a new seal over it."""
    results["arms"][1]["quality"] -= 0.1
    seal(results, folder)


def everywhere(folder: Path, results: dict[str, Any]) -> None:
    """FLOPs of the head taken away in the ledger and in the results, and a new seal."""
    edit_ledger("flops_by_op.head", lambda flops: flops - 2)(folder, results)
    results["arms"][1]["flops"] -= 2
    results["arms"][1]["flops_by_op"]["head"] -= 2
    seal(results, folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit("arms.1.quality", lambda nll: nll - 0.1), "arm linear:norm: quality is"),
        (edit("arms.1.flops", lambda flops: flops - 1), "arm linear:norm: flops is"),
        (edit("arms.1.keep_counts", [96, 1, 1, 1]), "arm linear:norm: keep_counts is"),
        (edit("arms.1.wall_seconds", 0.001), "arm linear:norm: wall_seconds is 0.001 here"),
        (edit("arms.1.p_value", 0.0001), "results.json: its content was changed after the sweep wrote it"),
        (edit("conclusion.sentence", "We win."), "its content was changed after the sweep wrote it"),
        (without_seal, "results.json: has no seal in results.seal.json"),
        (edit("arms.1.run", "../elsewhere"), "an arm's run is '../elsewhere', it must name a folder below"),
        (edit_ledger("backend", lambda _: "other"), "its files are not those that results.json was made from"),
        (edit_ledger("flops_by_op.head", lambda flops: flops - 2), "arm linear:norm: flops is"),
        (edit_ledger("flops_by_op", lambda _: []), "is no ledger of an arm"),
        (edit_likelihoods, "arm linear:norm: quality is"),
        (resealed, "arm linear:norm: quality is"),
        (everywhere, "arm linear:norm: FLOPs of head by the closed form is"),
    ],
)  # fmt: skip
def test_results_edited_by_hand(
    finished: Path, tmp_path: Path, change: Callable[[Path, dict[str, Any]], None], named: str
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(finished, folder)
    results = json.loads((folder / "results.json").read_text())
    check_evidence(folder / "results.json", results)
    change(folder, results)
    with pytest.raises(AlteredRecord) as caught:
        check_evidence(folder / "results.json", results)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_results_copied_without_their_arms_rest_on_the_seal(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert not check_evidence(tmp_path / "results.json", results), "nothing to check"
    shutil.copy(finished / "results.seal.json", tmp_path)
    assert check_evidence(tmp_path / "results.json", results)
    results["arms"][1]["quality"] -= 0.1
    with pytest.raises(AlteredRecord, match="its content was changed after the sweep wrote it"):
        check_evidence(tmp_path / "results.json", results)
