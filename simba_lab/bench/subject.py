"""One op under test: its inputs, ours, the oracle, the peer, and the least work. Checked in full before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simba_lab.bench.checks import ALLOWED, poisoned_memory, relative_norm, require
from simba_lab.bench.floors import Ceilings, Work, floor
from simba_lab.bench.lines import Line, Target, beside, or_reason, timed
from simba_lab.bench.timing import Call, Timing, inputs_needed, time_calls

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
# Channels at full size whose gradients the oracle follows too; spread over all, no multiple of a block.
_FOLLOWED = 37


@dataclass(frozen=True)
class Peer:
    """Another implementation: ``convert`` lays inputs out as it wants them (not timed), ``call`` runs it.

    ``restore`` turns an output of its back into our layout, for comparison only. ``missing`` is why it cannot run.
    """

    name: str
    convert: Callable[[Tensors], Tensors] = dict
    call: Callable[[Tensors], Outputs] | None = None
    restore: Callable[[Tensor], Tensor] = lambda out: out
    missing: str | None = None


@dataclass(frozen=True)
class Subject:
    """An op at one size.

    Args:
        what: name and size, for people.
        draw: fresh random inputs by name from a generator; names in ``differentiated`` get gradients.
        ours: inputs -> outputs, all of which get gradients.
        oracle: the same in any dtype, readable; it gets fp64.
        peer: what runs beside it, or None.
        forward: least work of a forward pass.
        backward: least work of a backward pass, None if there is none.
        differentiated: names of inputs, in the order in which gradients are returned.
        channel_axis: axis of the channels by name, where every channel stands for itself: then the oracle follows a
            few channels of gradients at full size instead of all. An output's channels are its last axis.
        exact: outputs are indices or copies: any difference is an error.
        targets: figure aimed at, forward and forward + backward.
    """

    what: str
    draw: Callable[[torch.Generator], Tensors]
    ours: Callable[[Tensors], Outputs]
    oracle: Callable[[Tensors], Outputs]
    forward: Work
    backward: Work | None = None
    peer: Peer | None = None
    differentiated: tuple[str, ...] = ()
    channel_axis: Mapping[str, int] = field(default_factory=dict)
    exact: bool = False
    targets: tuple[Target | None, Target | None] = (None, None)


def check(subject: Subject, generator: torch.Generator) -> list[dict[str, object]]:
    """Records of the passed checks: outputs, then gradients. Raises RedCheck for the first that is off."""
    inputs = subject.draw(generator)
    with poisoned_memory(), torch.no_grad():
        got = subject.ours(inputs)
    with torch.no_grad():
        want = subject.oracle(_wide(inputs))
    allowed = 0.0 if subject.exact else ALLOWED[_dtype(inputs)]
    records = [require(f"{subject.what}, forward", _numbered(got), _numbered(want), allowed)]
    if subject.backward is None:
        return records
    channels = _followed(got[0], generator) if subject.channel_axis else None
    upstream = [_only(torch.randn(out.shape, generator=generator, device=out.device).to(out), channels) for out in got]
    with poisoned_memory():
        mine = _gradients(subject, subject.ours, inputs, upstream)
    if channels is not None:
        upstream = [gradient[..., channels] for gradient in upstream]
    theirs = _gradients(
        subject, subject.oracle, _cut(_wide(inputs), channels, subject), [gradient.double() for gradient in upstream]
    )
    name = f"{subject.what}, backward" + ("" if channels is None else f" of {len(channels)} channels")
    return [*records, require(name, _cut(mine, channels, subject), theirs, ALLOWED[_dtype(inputs)])]


def measure(subject: Subject, generator: torch.Generator, ceilings: Ceilings, repeats: int) -> list[Line]:
    """Ours and the peer's times, forward and, where there is one, forward + backward."""
    first = subject.draw(generator)
    device = next(iter(first.values())).device
    sets = [first, *(subject.draw(generator) for _ in range(inputs_needed(subject.forward.bytes, device) - 1))]
    lines = [_line(subject, sets, device, ceilings, repeats, backward=False)]
    if subject.backward is not None:
        lines.append(_line(subject, sets, device, ceilings, repeats, backward=True))
    return lines


def _line(
    subject: Subject, sets: list[Tensors], device: torch.device, ceilings: Ceilings, repeats: int, backward: bool
) -> Line:
    work = subject.forward + subject.backward if backward else subject.forward
    what = subject.what
    if subject.differentiated:
        what += ", forward + backward" if backward else ", forward"
    ours = time_calls([_call(subject.ours, subject, tensors, backward) for tensors in sets], device, repeats)
    least = floor(work, ceilings)
    if subject.peer is None:
        return timed(what, ours, least)
    theirs = or_reason(subject.peer.name, lambda: _peer_time(subject, sets, device, repeats, backward))
    return beside(what, ours, subject.peer.name, theirs, subject.targets[int(backward)], least)


def _peer_time(
    subject: Subject, sets: list[Tensors], device: torch.device, repeats: int, backward: bool
) -> Timing | str:
    """The peer's time, or why there is none: it is missing, or its output differs from ours."""
    peer = subject.peer
    if peer.missing is not None:
        return peer.missing
    converted = [{name: tensor.detach() for name, tensor in peer.convert(tensors).items()} for tensors in sets]
    with torch.no_grad():
        pairs = zip(peer.call(converted[0]), subject.ours(sets[0]), strict=True)
        error = max(relative_norm(peer.restore(theirs), ours) for theirs, ours in pairs)
    allowed = 2 * ALLOWED[_dtype(sets[0])]
    if not error <= allowed:
        return f"{peer.name} differs from ours by {error:.1e} (allowed {allowed:.0e})"
    return time_calls([_call(peer.call, subject, tensors, backward) for tensors in converted], device, repeats)


def _call(op: Callable[[Tensors], Outputs], subject: Subject, tensors: Tensors, backward: bool) -> Call:
    """The op on one set of inputs, without arguments; with ``backward`` its gradients too."""
    if not backward:

        def forward_only() -> Outputs:
            with torch.no_grad():
                return op(tensors)

        return forward_only
    leaves = _leaves(subject, tensors)
    with torch.no_grad():
        upstream = [torch.randn_like(out) for out in op(tensors)]
    wanted = [leaves[name] for name in subject.differentiated]
    return lambda: torch.autograd.grad(op(leaves), wanted, upstream)


def _leaves(subject: Subject, tensors: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_(name in subject.differentiated) for name, tensor in tensors.items()}


def _gradients(subject: Subject, op: Callable[[Tensors], Outputs], inputs: Tensors, upstream: list[Tensor]) -> Tensors:
    leaves = _leaves(subject, inputs)
    gradients = torch.autograd.grad(op(leaves), [leaves[name] for name in subject.differentiated], upstream)
    return dict(zip(subject.differentiated, gradients, strict=True))


def _numbered(outputs: Outputs) -> Tensors:
    return {f"output {number}": out for number, out in enumerate(outputs)}


def _followed(output: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(output.shape[-1], generator=generator, device=output.device)
    return order[:_FOLLOWED].sort().values


def _only(gradient: Tensor, channels: Tensor | None) -> Tensor:
    """The gradient with zeros outside of ``channels``: then what it causes lies in them, and in sums over them."""
    if channels is None:
        return gradient
    return gradient * torch.zeros_like(gradient[0, 0]).index_fill(0, channels, 1.0)


def _cut(tensors: Tensors, channels: Tensor | None, subject: Subject) -> Tensors:
    """The tensors with only these channels; those without a channel axis stay whole."""
    if channels is None:
        return tensors
    axes = subject.channel_axis
    return {
        name: tensor.index_select(axes[name], channels) if name in axes else tensor for name, tensor in tensors.items()
    }


def _wide(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of the activations, which come first."""
    return next(iter(tensors.values())).dtype
