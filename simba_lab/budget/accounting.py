"""All that `simba-lab flops` says about a model: FLOPs by op and layer beside the dense ones, cross-checked or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simba_lab.budget.count import verify
from simba_lab.kernels.cost import CONVENTION
from simba_lab.model import Breakdown, LanguageModel
from simba_lab.model.cost import OUTSIDE
from simba_lab.model.shapes import parameter_count

UNIT = "FLOPs per window of n_context + n_suffix tokens"
_PREFIXES = ((10**15, "PFLOPs"), (10**12, "TFLOPs"), (10**9, "GFLOPs"), (10**6, "MFLOPs"), (10**3, "kFLOPs"))


@dataclass(frozen=True)
class Pass:
    """One kind of pass over a window, beside the same pass of the dense model."""

    flops: Breakdown
    dense: Breakdown

    @property
    def share_of_dense(self) -> float:
        return self.flops.total / self.dense.total

    def ops(self) -> Iterator[tuple[str, int, float]]:
        """(op, FLOPs, share of the total), in the order in which they run."""
        for op, flops in self.flops.by_op().items():
            yield op, flops, flops / self.flops.total

    def layers(self) -> Iterator[tuple[str, int, float]]:
        """(layer number or "head", FLOPs, share of the total)."""
        for layer, flops in self.flops.by_layer().items():
            yield "head" if layer == OUTSIDE else str(layer), flops, flops / self.flops.total

    def to_dict(self) -> dict[str, Any]:
        return {
            "flops": self.flops.total,
            "by_op": {op: flops for op, flops, _ in self.ops()},
            "by_layer": {layer: flops for layer, flops, _ in self.layers()},
            "dense_flops": self.dense.total,
            "share_of_dense": self.share_of_dense,
        }


@dataclass(frozen=True)
class Account:
    """FLOPs of one model on windows of one size; ``verified``: fvcore has confirmed the closed form, op by op."""

    model: LanguageModel
    n_context: int
    n_suffix: int
    head: str
    inference: Pass
    verified: bool

    @property
    def training(self) -> Pass:
        """Forward and backward."""
        return Pass(self.inference.flops.training(), self.inference.dense.training())

    @property
    def parameters(self) -> int:
        return parameter_count(self.model.config)

    @property
    def keep_counts(self) -> list[int]:
        return self.model.keep_counts(self.n_context)

    def tokens(self) -> list[int]:
        """Tokens processed by each layer: context that is left, and suffix."""
        return [count + self.n_suffix for count in self.keep_counts]

    @property
    def mean_keep(self) -> float:
        return sum(self.keep_counts) / (len(self.keep_counts) * self.n_context)

    @property
    def final_keep(self) -> float:
        return self.keep_counts[-1] / self.n_context

    def to_dict(self) -> dict[str, Any]:
        """Plain data: inference FLOPs at the top, what they hold for beside them."""
        pruning = self.model.pruning
        return {
            **self.inference.to_dict(),
            "unit": UNIT,
            "convention": CONVENTION,
            "parameters": self.parameters,
            "n_context": self.n_context,
            "n_suffix": self.n_suffix,
            "head": self.head,
            "keep_counts": self.keep_counts,
            "mean_keep": self.mean_keep,
            "final_keep": self.final_keep,
            "pruning": None if pruning is None else pruning.spec(),
            "model": self.model.config.to_dict(),
            "verified": self.verified,
        }


def account(model: LanguageModel, n_context: int, n_suffix: int, head: str, check: bool) -> Account:
    """The account of ``model``; with ``check``, fvcore counts it too and CostMismatch says where they differ."""
    closed = verify(model, n_context, n_suffix, head) if check else model.flops(n_context, n_suffix, head)
    dense = model.with_pruning(None).flops(n_context, n_suffix, head)
    return Account(model, n_context, n_suffix, head, Pass(closed, dense), check)


def readable(flops: int) -> str:
    """Four digits and a unit: ``227.9 GFLOPs``."""
    for size, unit in _PREFIXES:
        if flops >= size:
            return f"{flops / size:.4g} {unit}"
    return f"{flops} FLOPs"
