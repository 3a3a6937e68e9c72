"""Where the boundary's output comes from: contributions by token, shares by distance, and how far back they reach."""

from __future__ import annotations

import torch
from torch import Tensor

from simba_lab.kernels.reference import impact_per_channel, ssd_impact_per_channel, step_size
from simba_lab.model.mamba import Mixer, MixerSignals
from simba_lab.model.mamba2 import Mamba2Mixer

NEGLIGIBLE = 0.01
_NUMBERS_AT_ONCE = 1 << 22


def contributions(mixer: Mixer | Mamba2Mixer, signals: MixerSignals) -> Tensor:
    """``sum_d |dy_b(t)[d]|`` (B, k) fp64 of every token at the last of k, before gate and skip connection.

    ``dy_b(t)`` is what token t adds through the recurrence to the boundary's output (design page, section 3; Simba).
    """
    x, dt, B, C = (tensor.double() for tensor in (signals.x, signals.dt, signals.B, signals.C))
    delta, A = step_size(dt, mixer.dt_bias.double()), mixer.A.double()
    if A.dim() == 1:
        return ssd_impact_per_channel(x.unflatten(-1, (len(A), -1)), delta, A, B, C[:, -1]).abs().sum((-1, -2))
    total = x.new_zeros(x.shape[:2])
    step = max(1, _NUMBERS_AT_ONCE // (x.shape[0] * x.shape[1] * A.shape[1]))
    for channels in torch.arange(x.shape[2], device=x.device).split(step):
        part = impact_per_channel(x[..., channels], delta[..., channels], A[channels], B, C[:, -1])
        total += part.abs().sum(-1)
    return total


def share_by_distance(added: Tensor, distance: Tensor, longest: int) -> list[float]:
    """Share of the total of ``added`` (k,) by ``distance`` (k,) in tokens: 0, then [2^(i-1), 2^i) up to ``longest``.

    Shares sum to 1, or are all 0 if nothing is added.
    """
    bins = torch.zeros(len(distance_bins(longest)), dtype=torch.float64)
    bins.index_add_(0, torch.tensor([value.bit_length() for value in distance.tolist()]), added.double())
    total = float(added.sum())
    return (bins / total if total else bins).tolist()


def distance_bins(longest: int) -> list[tuple[int, int]]:
    """(first, last) distance of every bin of :func:`share_by_distance`; the last may reach past ``longest``."""
    return [(0, 0)] + [(1 << power, (2 << power) - 1) for power in range(longest.bit_length())]


def reach(added: Tensor, distance: Tensor, negligible: float = NEGLIGIBLE) -> int:
    """The least distance beyond which all tokens together add less than ``negligible`` of the total.

    ``added`` (k,) and ``distance`` (k,) run from the farthest token to the boundary at distance 0.
    """
    from_afar = added.double().cumsum(0)
    matters = from_afar >= negligible * from_afar[-1]
    return int(distance[int(matters.int().argmax())])
