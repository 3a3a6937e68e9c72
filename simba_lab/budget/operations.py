"""What the counter knows about each traced operation: a handle that returns multiply-adds, or a place among the free.

Nothing is zero by omission: an operation that is in neither table stops the count. The free ones follow the convention
of :mod:`simba_lab.kernels.cost`: moving data, norms, activations, residual additions, per-parameter work, and integer
arithmetic (positions, and the hash behind ``random``), because it holds no floating-point operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

from simba_lab.errors import InputError
from simba_lab.kernels import cost

Handle = Callable[[list[Any], list[Any]], Any]
SELECT = "select of "
"""Name under which a sort is counted, followed by how many tokens it orders; that number tells the layer."""


class UncountedOperation(InputError):
    """An operation ran whose cost nobody has stated; the message names it and where it ran."""


# Reads, writes, moves or describes data.
_MOVES = """Int ScalarImplicit arange cat chunk contiguous detach embedding expand expand_as flatten flip full
full_like gather index_select narrow new_empty new_full new_ones new_zeros empty empty_like ones ones_like permute
reshape select size slice split split_with_sizes squeeze stack t to transpose type_as unbind unflatten unsqueeze view
where zeros zeros_like"""

# Floating-point work that the convention leaves out: norms, activations, residual and bias additions, A = -exp(A_log),
# the cleaning of scores before they are sorted, and the scaling of ``random``'s integers to [0, 1).
_BY_CONVENTION = "rms_norm silu softplus add exp neg nan_to_num div"

_INTEGER_ONLY = "__and__ __lshift__ __or__ __rshift__ __xor__ eq floor_divide ge gt le lt mul remainder sub sum"

_MLP = ".mlp"
"""End of the scope in which a product is the gate of an MLP, part of its activation: free like a mixer's gate."""
_FLOATING = {"Half", "BFloat16", "Float", "Double", "ComplexFloat", "ComplexDouble"}

_NORMS = {"simba_lab::add_rms_norm", "simba_lab::gated_rms_norm"}
FREE = frozenset(_NORMS | {f"aten::{name}" for name in f"{_MOVES} {_BY_CONVENTION}".split()})


def handles() -> dict[str, Handle]:
    """Operation -> handle from its traced inputs and outputs to multiply-adds (FLOPs / 2, so halves occur).

    Shapes come from the trace and formulas from the op's own cost; matrix products have fvcore's handles.
    """
    from fvcore.nn.jit_handles import linear_flop_jit

    table: dict[str, Handle] = {
        "simba_lab::linear": linear_flop_jit,
        "simba_lab::causal_conv": _causal_conv,
        "simba_lab::selective_scan": _selective_scan,
        "simba_lab::global_impact": _global_impact,
        "simba_lab::ssd": _ssd,
        "simba_lab::ssd_impact": _ssd_impact,
        "aten::linalg_vector_norm": _vector_norm,
        "aten::sort": _sort,
    }
    for name in _INTEGER_ONLY.split():
        table[f"aten::{name}"] = _integer_only
    return table


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _is_floating(value: Any) -> bool:
    return value.isCompleteTensor() and value.type().scalarType() in _FLOATING


def _causal_conv(inputs: list[Any], outputs: list[Any]) -> float:
    (batch, length, channels), (_, width) = _shape(inputs[0]), _shape(inputs[1])
    return cost.causal_conv(batch * length, channels, width) / 2


def _selective_scan(inputs: list[Any], outputs: list[Any]) -> float:
    (batch, length, channels), (_, states) = _shape(inputs[0]), _shape(inputs[3])
    return cost.selective_scan(batch * length, channels, states) / 2


def _global_impact(inputs: list[Any], outputs: list[Any]) -> float:
    (batch, length, channels), (_, states) = _shape(inputs[0]), _shape(inputs[3])
    reduce, gated = inputs[7].toIValue(), inputs[8].toIValue()
    return cost.global_impact(batch * length, channels, states, gated, reduce) / 2


def _ssd(inputs: list[Any], outputs: list[Any]) -> float:
    (batch, length, heads, width), (*_, states) = _shape(inputs[0]), _shape(inputs[3])
    return cost.ssd(batch * length, heads * width, states) / 2


def _ssd_impact(inputs: list[Any], outputs: list[Any]) -> float:
    (batch, length, heads, width), (*_, groups, states) = _shape(inputs[0]), _shape(inputs[4])
    reduce, gated = inputs[7].toIValue(), inputs[8].toIValue()
    return cost.ssd_impact(batch * length, heads * width, heads, groups, states, gated, reduce) / 2


def _vector_norm(inputs: list[Any], outputs: list[Any]) -> float:
    """Norms over the last dimension: of its size are the vectors, all others count them."""
    *vectors, channels = _shape(inputs[0])
    return cost.vector_norm(prod(vectors), channels) / 2


def _sort(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Sorting scores (B, k) is the cost of selection; sorting positions is integer work and free."""
    if not _is_floating(inputs[0]):
        return Counter()
    batch, tokens = _shape(inputs[0])
    return Counter({f"{SELECT}{tokens}": batch * cost.select(tokens) / 2})


def _integer_only(inputs: list[Any], outputs: list[Any]) -> float:
    node = outputs[0].node()
    if node.kind() == "aten::mul" and node.scopeName().endswith(_MLP):
        return 0
    if any(map(_is_floating, [*inputs, *outputs])):
        raise UncountedOperation(uncounted(f"{node.kind()} on floating-point numbers", node.scopeName()))
    return 0


def uncounted(operation: str, scope: str) -> str:
    """The one-line message about an operation without a cost."""
    where = scope.strip("/").rpartition("/")[2] or "the model"
    return f"{operation} ran in {where} and has no cost; a criterion with op = None has its operations measured"
