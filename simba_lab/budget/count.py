"""FLOPs by fvcore, from a trace of what the model executes: the independent check of the closed form.

The model is rebuilt without data on the ``meta`` device and traced there, so that neither its size nor a compiler nor a
wrapper changes the number. fvcore counts multiply-adds; :func:`_flops` is the one place that converts them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simba_lab.budget.operations import FREE, SELECT, UncountedOperation, handles, uncounted
from simba_lab.errors import InputError
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import Breakdown, LanguageModel
from simba_lab.model.cost import OUTSIDE
from simba_lab.pruning import Criterion, PruningPlan, ScoredShape, Signals

FLOPS_PER_MULTIPLY_ADD = 2


class CostMismatch(InputError):
    """Closed form and counter disagree; the message names the op and both numbers."""


class _ScoreScope(nn.Module):
    """Gives the scoring of one layer a scope of its own in the trace, and notes the sizes it was given.

    A criterion with ``op = None`` is not traced: its cost is what counting its operations gives, for the sizes noted,
    and tracing them as well would count them twice.
    """

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion
        self.seen: ScoredShape | None = None

    def forward(self, signals: Signals) -> Tensor:
        self.seen = signals.shape
        if self.criterion.op is None:
            return signals.hidden.new_empty(signals.hidden.shape[:2])
        return self.criterion.score(signals)


class _ScopedCriterion(Criterion):
    """Stands in for the plan's criterion during the trace and sends each layer to its scope."""

    op = "scoped"

    def __init__(self, scopes: nn.ModuleList) -> None:
        self.scopes = scopes

    def score(self, signals: Signals) -> Tensor:
        return self.scopes[signals.layer](signals)

    def flops(self, shape: ScoredShape) -> int:
        return 0


class _Traced(nn.Module):
    """The data-free twin with one set of arguments, as fvcore wants it: tensors in, one tensor out."""

    def __init__(self, twin: LanguageModel, plan: PruningPlan | None, n_context: int, head: str) -> None:
        super().__init__()
        self.n_context, self.head = n_context, head
        self.scores = nn.ModuleList()
        if plan is not None:
            self.scores.extend(_ScoreScope(plan.criterion) for _ in range(twin.config.n_layer))
            # Compacted always: convolutions of true neighbours cost the same and are no single op in a trace.
            plan = PruningPlan(_ScopedCriterion(self.scores), plan.schedule, plan.protect_recent)
        self.model = twin.with_pruning(plan)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, n_context=self.n_context, head=self.head).logits

    def scored(self) -> dict[int, ScoredShape]:
        """Layer -> sizes, for the layers whose tokens were scored."""
        return {layer: scope.seen for layer, scope in enumerate(self.scores) if scope.seen is not None}


def count_forward(model: LanguageModel, n_context: int, n_suffix: int, head: str = "scored") -> Breakdown:
    """FLOPs of one sequence by (layer, op), as fvcore counts them in a trace.

    Raises InputError for a compiled or altered model, UncountedOperation for an operation without a stated cost.
    """
    with torch.device("meta"):
        twin = LanguageModel(model.config, seed=None)
        tokens = torch.empty(1, n_context + n_suffix, dtype=torch.int64)
    _refuse_unlike(model, twin)
    traced = _Traced(twin, model.pruning, n_context, head)
    multiply_adds = _by_scope(traced, tokens)
    scored = traced.scored()
    layer_of = {shape.n_tokens: layer for layer, shape in scored.items()}
    entries: dict[tuple[int, str], int] = {(layer, "score"): 0 for layer in scored}
    for scope, op, count in multiply_adds:
        key = _entry(scope, op, layer_of)
        entries[key] = entries.get(key, 0) + _flops(count)
    if model.pruning is not None and model.pruning.criterion.op is None:
        entries |= {(layer, "score"): model.pruning.criterion.flops(shape) for layer, shape in scored.items()}
    return Breakdown(entries)


def verify(model: LanguageModel, n_context: int, n_suffix: int, head: str = "scored") -> Breakdown:
    """The closed form, after fvcore has confirmed every (layer, op) of it to the last digit; else CostMismatch."""
    closed, counted = model.flops(n_context, n_suffix, head), count_forward(model, n_context, n_suffix, head)
    for layer, op in sorted(closed.entries.keys() | counted.entries.keys()):
        formula, count = closed.entries.get((layer, op)), counted.entries.get((layer, op))
        if formula != count:
            where = "outside the layers" if layer == OUTSIDE else f"in layer {layer}"
            raise CostMismatch(f"{op} {where}: closed form {_number(formula)} FLOPs, fvcore {_number(count)} FLOPs")
    return closed


def _number(flops: int | None) -> str:
    return "no" if flops is None else f"{flops:,}"


def _flops(multiply_adds: float) -> int:
    flops = int(multiply_adds * FLOPS_PER_MULTIPLY_ADD)
    assert flops == multiply_adds * FLOPS_PER_MULTIPLY_ADD, multiply_adds
    return flops


def refuse_altered(model: LanguageModel) -> None:
    """Raises InputError naming the module for a model whose ledger could not be trusted: compiled, replaced, hooked."""
    with torch.device("meta"):
        twin = LanguageModel(model.config, seed=None)
    _refuse_unlike(model, twin)


def _refuse_unlike(model: nn.Module, twin: LanguageModel) -> None:
    """The twin speaks for the model only if both are made of the same modules and shapes."""
    original = dict(twin.named_modules())
    for name, module in model.named_modules():
        kind, label = type(module).__name__, f"model.{name}" if name else "model"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(f"{label} is compiled ({kind}): count FLOPs on the model before torch.compile")
        if type(module) is not type(original.get(name)) or "forward" in vars(module):
            raise InputError(f"{label} is a {kind}, not what its config describes: FLOPs cannot be counted from it")
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(f"{label} has forward hooks, whose work nobody counts: remove them")
    shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.shape != shapes.get(name):
            raise InputError(f"model.{name} has shape {tuple(parameter.shape)}, not what its config describes")


def _by_scope(traced: _Traced, tokens: Tensor) -> list[tuple[str, str, float]]:
    """(module, op, multiply-adds) of what ran in each module itself, its children left out."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(traced, tokens).set_op_handle(**handles())
    # fvcore skips a list of operations of its own; ours replaces it, so that nothing is skipped unsaid.
    analysis._ignored_ops = set(FREE)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad(), recording(Ledger()):
        counts = analysis.by_module_and_operator()
    for scope in sorted(counts, key=len, reverse=True):
        for operation in analysis.unsupported_ops(scope):
            raise UncountedOperation(uncounted(operation, scope))
    return [(scope, op, count) for scope in counts for op, count in _without_children(counts, scope).items()]


def _without_children(counts: Mapping[str, Counter[str]], scope: str) -> Counter[str]:
    own = Counter(counts[scope])
    for child, inner in counts.items():
        if child and child.rpartition(".")[0] == scope:
            own.subtract(inner)
    return Counter({op: count for op, count in own.items() if count})


def _entry(scope: str, op: str, layer_of: Mapping[int, int]) -> tuple[int, str]:
    """Key in a Breakdown of ``op`` counted in the module ``scope``.

    A sort runs between the layers; the number of tokens it orders tells which layer it belongs to, since every layer
    that is followed by pruning has more tokens than the next.
    """
    if op.startswith(SELECT) and scope == "model":
        return layer_of[int(op.removeprefix(SELECT))], "select"
    if scope == "model.lm_head":
        return OUTSIDE, "head"
    if match := re.fullmatch(r"scores\.(\d+)", scope):
        return int(match[1]), "score"
    if match := re.fullmatch(r"model\.backbone\.layers\.(\d+)\.(?:mixer|mlp)(?:\.(\w+))?", scope):
        return int(match[1]), match[2] or op
    raise UncountedOperation(f"{op} ran in {scope or 'the model'}, where the closed form has no entry for it")
