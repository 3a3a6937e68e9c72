"""The highways measured: redundancy by layer, information flow to the boundary, path length, loss without a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.inspection.flow import contributions, reach, share_by_distance
from simba_lab.inspection.observing import bypassed, watched
from simba_lab.inspection.passage import Passage
from simba_lab.inspection.path import fewest_scan_steps
from simba_lab.inspection.redundancy import any_pair_similarity, neighbour_similarity
from simba_lab.model import LanguageModel
from simba_lab.model.mamba import MixerSignals
from simba_lab.pruning import CRITERIA, Criterion, PruningPlan
from simba_lab.pruning.schedules import HighwayTop

Say = Callable[[str], None]


def measure_highways(
    arms: Sequence[tuple[str, LanguageModel]], passage: Passage, keep: float, say: Say
) -> dict[str, Any]:
    """Every measurement, as means over the windows of ``passage``; ``say`` hears a line before each piece of work.

    ``arms``: dense first, one :func:`measure_arm` each. ``loss_rise``: one :func:`loss_rise` for every criterion among
    the arms, at the share ``keep``.
    """
    dense = arms[0][1].with_pruning(None)
    every = [("dense", dense), *((name, arm) for name, arm in arms if arm.pruning is not None)]
    return {
        "windows": len(passage.windows),
        "n_context": passage.n_context,
        "n_suffix": passage.n_suffix,
        "keep": keep,
        "arms": [measure_arm(name, arm, passage, say) for name, arm in every],
        "loss_rise": [loss_rise(dense, criterion, passage, keep, say) for criterion in _criteria(arms)],
    }


def work(arms: Sequence[tuple[str, LanguageModel]], passage: Passage) -> int:
    """How many lines :func:`measure_highways` will say."""
    measured = 1 + sum(arm.pruning is not None for _, arm in arms)
    return len(passage.windows) * (measured + len(_criteria(arms)) * (arms[0][1].config.n_layer - 1))


def _criteria(arms: Sequence[tuple[str, LanguageModel]]) -> list[Criterion]:
    """Each criterion of the arms once, options counting."""
    by_spec = {str(CRITERIA.spec(arm.pruning.criterion)): arm.pruning.criterion for _, arm in arms if arm.pruning}
    return list(by_spec.values())


@torch.no_grad()
def measure_arm(name: str, arm: LanguageModel, passage: Passage, say: Say) -> dict[str, Any]:
    """Redundancy, flow and path of one arm on the contexts of a passage; lists are by layer.

    ``neighbour_similarity`` and ``any_pair_similarity`` (cosines, None with one token); ``share`` (layer, distance
    bin) sums to 1 in each layer, bin i holding distances [2^(i-1), 2^i) tokens and bin 0 distance 0; ``reach`` in
    tokens; ``scan_steps``: of the shortest path.
    """
    rows = []
    for window in range(len(passage.windows)):
        say(f"{name}: flow, window {window + 1} of {len(passage.windows)}")
        rows.append(_flow_of(arm, passage.windows[window : window + 1, : passage.n_context].to(arm.device)))
    return {"name": name} | {key: _mean([row[key] for row in rows]) for key in rows[0]}


def _flow_of(arm: LanguageModel, context: Tensor) -> dict[str, list[Any]]:
    """The measurements of one context (1, T)."""
    neighbours, pairs, added = [], [], []

    def watch(layer: int, residual: Tensor, signals: MixerSignals) -> None:
        neighbours.append(neighbour_similarity(residual[0]))
        pairs.append(any_pair_similarity(residual[0]))
        added.append(contributions(arm.backbone.layers[layer].mixer, signals)[0].cpu())

    with watched(arm, watch):
        kept = [positions[0].cpu() for positions in arm.prefill(context).kept]
    boundary = context.shape[1] - 1
    distances = [boundary - positions for positions in kept]
    return {
        "neighbour_similarity": neighbours,
        "any_pair_similarity": pairs,
        "share": [share_by_distance(*of_layer, boundary) for of_layer in zip(added, distances, strict=True)],
        "reach": [reach(*of_layer) for of_layer in zip(added, distances, strict=True)],
        "scan_steps": fewest_scan_steps([positions.tolist() for positions in kept]),
    }


@torch.no_grad()
def loss_rise(dense: LanguageModel, criterion: Criterion, passage: Passage, keep: float, say: Say) -> dict[str, Any]:
    """What the suffix loses when one layer alone sees a share ``keep`` of the context, by layer, nats per token.

    The tokens that layer l sees are those that ``criterion`` chooses after layer l - 1 of the dense model; the others
    go around it (:func:`bypassed`). ``rise[l]`` is the mean suffix NLL then minus that of the dense model, over
    windows; ``error[l]`` its standard error over windows, None with one window. None for layer 0, never pruned.
    """
    n_layer, name = dense.config.n_layer, CRITERIA.name_of(criterion)
    rises: list[list[float]] = []
    for number, window in enumerate(passage.windows.split(1)):
        tokens = window.to(dense.device)
        baseline = _suffix_nll(dense, tokens, passage.n_context)
        row = []
        for layer in range(1, n_layer):
            say(f"{name}: loss without layer {layer}, window {number + 1} of {len(passage.windows)}")
            kept = _chosen(dense, criterion, tokens[:, : passage.n_context], layer, keep)
            with bypassed(dense, layer, kept, passage.n_context):
                row.append(_suffix_nll(dense, tokens, passage.n_context) - baseline)
        rises.append(row)
    of_layers = torch.tensor(rises, dtype=torch.float64).reshape(len(rises), n_layer - 1)
    error = of_layers.std(0) / len(rises) ** 0.5 if len(rises) > 1 else None
    return {
        "criterion": name,
        "rise": [None, *of_layers.mean(0).tolist()],
        "error": [None] * n_layer if error is None else [None, *error.tolist()],
    }


def _chosen(dense: LanguageModel, criterion: Criterion, context: Tensor, layer: int, keep: float) -> Tensor:
    """Positions (1, k) that ``criterion`` lets into ``layer`` when all layers below it are dense."""
    plan = PruningPlan(criterion, HighwayTop(keep, from_layer=layer))
    return dense.with_pruning(plan).prefill(context).kept[layer]


def _suffix_nll(model: LanguageModel, tokens: Tensor, n_context: int) -> float:
    """Mean over the suffix, nats per token."""
    logits = model(tokens, n_context=n_context).logits[0, :-1]
    return float(F.cross_entropy(logits.double(), tokens[0, n_context:]))


def _mean(values: list[Any]) -> Any:
    """Elementwise mean of equal nests of lists; None where any is None."""
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return None if None in values else sum(values) / len(values)
