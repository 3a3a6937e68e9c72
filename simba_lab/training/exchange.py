"""Gradients averaged among processes after the backward pass instead of, as ``ddp`` does it, during it.

A captured backward pass is one launch: nothing can be sent on the way. Where GPUs are linked that should not cost much:
the gradients of 130 million weights are 0.5 GB, beside a step of 120 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

BUCKET = 2**25
"""Gradients sent at once: enough to fill the links, few enough that copying one lot overlaps with sending another."""


def refusal(strategy: Strategy) -> str | None:
    """Why gradients under ``strategy`` cannot be exchanged after the backward pass, or None if they can or need not."""
    if isinstance(strategy, SingleDeviceStrategy):
        return None
    if type(strategy) is not DDPStrategy or not isinstance(strategy.model, DistributedDataParallel):
        return f"{type(strategy).__name__} exchanges gradients during the backward pass"
    wrapped = strategy.model
    if wrapped.find_unused_parameters or wrapped.static_graph:
        return "find_unused_parameters and static_graph look at the backward pass"
    if wrapped._comm_hooks:
        return "a communication hook exchanges gradients"
    return None


class Exchange:
    """Takes the exchange of gradients from a ``DistributedDataParallel`` until :meth:`close`.

    Then every process must call :meth:`average` after every backward pass, whichever way it came by its gradients.
    """

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._group = wrapped.process_group
        self._parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        self._silenced = ExitStack()
        self._silenced.enter_context(wrapped.no_sync())

    def close(self) -> None:
        """Gives it back."""
        self._silenced.close()

    @torch.no_grad()
    def average(self) -> None:
        """Each ``.grad`` becomes its mean over the processes: divided, then added up, as ``ddp`` does it."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        share, sent = 1 / dist.get_world_size(self._group), []
        for bucket in buckets(gradients, BUCKET):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).mul_(share)
            sent.append((bucket, flat, dist.all_reduce(flat, group=self._group, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view(own.shape) for part, own in zip(parts, bucket, strict=True)])


def buckets(tensors: Sequence[Tensor], elements: int) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most so many elements together, or one tensor that is larger."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and (held + tensor.numel() > elements or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    if bucket:
        yield bucket
