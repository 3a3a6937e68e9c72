"""The FLOPs of a criterion that states none: its ``score`` runs on the meta device and what it executes is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from simba_lab.errors import InputError
from simba_lab.kernels import cost, resolve
from simba_lab.pruning.signals import ScoredShape, Signals

if TYPE_CHECKING:
    from simba_lab.pruning.criteria import Criterion

# Ops that move or create data but compute nothing.
_FREE = frozenset(
    "view reshape _unsafe_view expand permute transpose t slice select unsqueeze squeeze split cat stack clone detach "
    "alias as_strided arange full full_like zeros zeros_like ones ones_like empty empty_like new_zeros new_ones "
    "new_empty _to_copy to copy_ lift_fresh gather index index_select flip unbind contiguous scalar_tensor".split()
)


def _conv(x: Tensor, weight: Tensor, *_: Any) -> int:
    return cost.causal_conv(x.shape[0] * x.shape[1], *weight.shape)


def _scan(x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, *_: Any) -> int:
    return cost.selective_scan(x.shape[0] * x.shape[1], *A.shape)


# Our own ops cost inside a user's criterion what they cost outside; arguments as in simba_lab.kernels.cpu and gpu.
_OURS: dict[str, Callable[..., int]] = {
    "causal_conv": _conv,
    "selective_scan": _scan,
    "global_impact": lambda x, dt, dt_bias, A, B, C, gate, reduce, gated: cost.global_impact(
        x.shape[0] * x.shape[1], *A.shape, gated, reduce
    ),
    "ssd": lambda x, delta, A, B, *_: cost.ssd(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], B.shape[3]),
    "ssd_impact": lambda x, dt, dt_bias, A, B, C, gate, reduce, gated: cost.ssd_impact(
        x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x.shape[2], B.shape[2], B.shape[3], gated, reduce
    ),
    "causal_conv_triton": _conv,
    "selective_scan_triton": _scan,
    "global_impact_triton": lambda x, dt, dt_bias, A, B, C, gate, reduce, series: cost.global_impact(
        x.shape[0] * x.shape[1], *A.shape, gate is not None, reduce
    ),
    "ssd_triton": lambda x, dt, dt_bias, A, B, *_: cost.ssd(
        x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], B.shape[3]
    ),
    "ssd_impact_triton": lambda x, dt, dt_bias, A, B, C, gate, reduce: cost.ssd_impact(
        x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], x.shape[2], B.shape[2], B.shape[3], gate is not None, reduce
    ),
}


# The counters that count now, the innermost last; None where a cost is stated.
_counters: ContextVar[tuple[OperationCounter | None, ...]] = ContextVar("counters", default=())


@contextmanager
def stated_cost(flops: int) -> Iterator[None]:
    """What runs inside is counted as ``flops`` and not op by op: a part of the model that a criterion calls."""
    for counter in _counters.get()[-1:]:
        if counter is not None:
            counter.flops += flops
    token = _counters.set((*_counters.get(), None))
    try:
        yield
    finally:
        _counters.reset(token)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


class OperationCounter(TorchDispatchMode):
    """Counts FLOPs of what runs inside: 2 per multiply-add of a matrix product, else 1 per element read or written.

    An elementwise op costs its output's elements, a reduction its input's: the larger of the two. Moving data is free.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __enter__(self) -> OperationCounter:
        self._token = _counters.set((*_counters.get(), self))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        _counters.reset(self._token)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if _counters.get()[-1] is None:
            return output
        packet = func.overloadpacket
        if func.namespace == "simba_lab":
            if packet.__name__ not in _OURS:
                known = ", ".join(_OURS)
                raise InputError(f"{packet.__name__} has no stated cost inside a criterion; use one of {known}")
            self.flops += _OURS[packet.__name__](*args)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=output))
        elif packet.__name__ not in _FREE:
            touched = _tensors(list(args)) + _tensors(output)
            self.flops += max((t.numel() for t in touched), default=0)
        return output


def measured_flops(criterion: Criterion, shape: ScoredShape) -> int:
    """FLOPs of ``criterion.score`` for one sequence of the given shape.

    Raises InputError if it cannot run on the meta device, that is if its cost depends on the data.
    """
    from simba_lab.pruning.criteria import CRITERIA, checked_scores

    name = CRITERIA.name_of(criterion)
    with torch.device("meta"), torch.no_grad():
        signals = meta_signals(shape)
        try:
            with OperationCounter() as counter:
                checked_scores(criterion, signals)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise InputError(f"criterion {name}: its cost cannot be counted without data: {first_line}") from None
    return counter.flops


def check_measured(criterion: Criterion, signals: Signals) -> Tensor:
    """Scores (B, k) of real signals, what computing them executes counted on the way.

    Raises InputError if that is more than the criterion is charged: a cost that was measured without data and is
    higher with them.
    """
    from simba_lab.pruning.criteria import CRITERIA, checked_scores

    charged = len(signals.positions) * criterion.flops(signals.shape)
    for field in dataclasses.fields(signals):  # what is computed on demand is no work of the criterion's
        getattr(signals, field.name)
    with OperationCounter() as counter:
        scores = checked_scores(criterion, signals)
    if counter.flops > charged:
        raise InputError(
            f"criterion {CRITERIA.name_of(criterion)}: executed {counter.flops:,} FLOPs in layer {signals.layer}, "
            f"but is charged {charged:,}; its cost must not depend on data, device or batch"
        )
    return scores


def meta_signals(shape: ScoredShape) -> Signals:
    """Signals of one sequence without data."""
    k, channels, steps = shape.n_tokens, shape.d_inner, shape.n_steps
    per_head = shape.n_heads is not None
    vector = (shape.n_groups, shape.d_state) if per_head else (shape.d_state,)
    return Signals(
        layer=0,
        backend=resolve("auto", "meta"),
        x=torch.empty(1, k, channels),
        dt=torch.empty(1, k, steps),
        dt_bias=torch.empty(steps),
        A=torch.empty(steps) if per_head else torch.empty(channels, shape.d_state),
        B=torch.empty(1, k, *vector),
        C=torch.empty(1, k, *vector),
        z=torch.empty(1, k, channels),
        hidden=torch.empty(1, k, shape.d_model),
        positions=torch.empty(1, k, dtype=torch.int64),
        sequence_key=torch.empty(1, dtype=torch.int64),
        n_free=shape.n_free,
    )
