"""Global impact as an op that tracers see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.kernels.cpu.arrays import as_array, computable, flat_views
from simba_lab.kernels.cpu.threads import use_torch_threads


def reading(B: Tensor, C_boundary: Tensor, multiple: int = 1):  # noqa: ANN201 - numpy array
    """Products of every token's B (B, k, N) with the boundary's C (B, N), flat, N padded to a multiple with zeros."""
    return F.pad(B * C_boundary[:, None], (0, -B.shape[2] % multiple)).flatten().numpy()


def vanished(scores):  # noqa: ANN001, ANN201 - number of the array's dtype
    """The power of two from which on down a decay counts as 0."""
    import numpy as np

    return scores.dtype.type(np.finfo(scores.dtype).minexp)


def over_jobs(best: Tensor, reduce: str) -> Tensor:
    """Scores (B, k) of what the kernels found in each block of channels (B, blocks, k)."""
    return best.sum(1).sqrt() if reduce == "l2" else best.amax(1)


@torch.library.custom_op("simba_lab::global_impact", mutates_args=(), device_types="cpu")
def _impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor, reduce: str,
    gated: bool,
) -> Tensor:  # fmt: skip
    from simba_lab.kernels.cpu import impact

    use_torch_threads()
    batch, length, channels = x.shape
    jobs = -(-channels // impact.WIDTH)
    best = x.new_empty(batch, jobs, length)
    found = best.view(-1).numpy()
    (x_, dt_), strides = flat_views(x, dt)
    impact.scores(
        x_, dt_, as_array(dt_bias), as_array(A), reading(B, C_boundary), as_array(gate), strides, length,
        impact.REDUCTIONS[reduce], vanished(found), jobs, found,
    )  # fmt: skip
    return over_jobs(best, reduce)


@_impact.register_fake
def _(x, dt, dt_bias, A, B, C_boundary, gate, reduce, gated):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape[:2])


def global_impact(
    x: Tensor, dt: Tensor, dt_bias: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor, gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:  # fmt: skip
    """See :func:`simba_lab.kernels.reference.global_impact`; scores carry no gradient."""
    weight = x.new_ones(x.shape[0], x.shape[2]) if gate is None else gate
    with torch.no_grad():
        tensors = map(computable, (x, dt, dt_bias, A, B, C_boundary, weight))
        return _impact(*tensors, reduce, gate is not None)
