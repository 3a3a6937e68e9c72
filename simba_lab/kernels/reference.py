"""Readable oracles of every kernel: plain torch, one token at a time, differentiable, any dtype.

Symbols (Mamba, Gu & Dao 2023, section 3; Simba for the score). Activations run (batch, length, channel).

==========  ==================  ===========================================================
``x``       (B, L, D)           input of the scan, one value per channel
``dt``      (B, L, D)           step size before bias and softplus
``delta``   (B, L, D)           step size: softplus(dt + dt_bias), positive
``A``       (D, N)              state matrix, negative
``B``, ``C``  (B, L, N)         input and output vectors of the state
``D``       (D,)                skip connection
``z``       (B, L, D)           gate: the output is multiplied by silu(z)
``h``       (B, D, N)           state: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
==========  ==================  ===========================================================

In Mamba-2 (Dao & Gu 2024) the channels form H heads of P, in G groups that share ``B`` and ``C``: ``x`` (B, L, H, P),
``dt`` and ``delta`` (B, L, H), ``A`` and ``D`` (H,), ``B`` and ``C`` (B, L, G, N), ``h`` (B, H, P, N); head h belongs
to group h // (H / G).

The recurrences accumulate in fp32 for fp16 and bf16 input and in the input's own dtype otherwise. The fast
backends are tested against this file, outputs and all gradients; it is not meant to be fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` (..., d_in) times ``weight`` (d_out, d_in) transposed: (..., d_out)."""
    return F.linear(x, weight)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU (Mamba section 3.4).

    ``x`` (B, L, D), ``weight`` (D, W), ``bias`` (D,), ``initial`` (B, W-1, D): the inputs before position 0 (zeros
    if None). Returns the output (B, L, D) and the last W-1 inputs (B, W-1, D), from which a later call continues.
    """
    batch, length, channels = x.shape
    width = weight.shape[1]
    if initial is None:
        initial = x.new_zeros(batch, width - 1, channels)
    padded = torch.cat([initial.to(x.dtype), x], dim=1)
    wide = padded.to(_accumulator(x))
    taps = weight.to(wide.dtype)
    total = bias.to(wide.dtype).expand(batch, length, channels)
    for tap in range(width):
        total = total + wide[:, tap : tap + length] * taps[:, tap]
    return F.silu(total).to(x.dtype), padded[:, length:]


def neighbour_conv(x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv` of tokens some of which are gone: a tap that would read a stranger reads zero.

    ``neighbours`` (B, L) says how many of the tokens before each in ``x`` also came directly before it in the text;
    W - 1 and more mean the same. With that many everywhere, and none at the start, this is :func:`causal_conv` from
    the first token on. The last inputs that are returned hold zeros for strangers of the last token.
    """
    width, wide = weight.shape[1], _accumulator(x)
    taps, inputs = weight.to(wide), x.to(wide)
    total = inputs * taps[:, -1] + bias.to(wide)
    for distance in range(1, min(width, x.shape[1])):
        known = (neighbours[:, distance:] >= distance)[..., None]
        earlier = torch.where(known, inputs[:, :-distance], 0) * taps[:, -1 - distance]
        total = total + F.pad(earlier, (0, 0, distance, 0))
    return F.silu(total).to(x.dtype), last_neighbours(x, width, neighbours)


def true_neighbours(positions: Tensor, n_context: int, n_suffix: int, width: int) -> Tensor:
    """Tokens directly before each in the text that are here too, as far as a convolution of ``width`` taps reads.

    ``positions`` (B, k) int64, ascending, of what is left of a context of ``n_context`` tokens; ``n_suffix`` tokens
    follow it, all of them here. Returns counts (B, k + n_suffix) int64 up to ``width - 1``.
    """
    suffix = torch.arange(n_context, n_context + n_suffix, device=positions.device)
    positions = torch.cat([positions, suffix.expand(positions.shape[0], n_suffix)], dim=1)
    neighbours = torch.zeros_like(positions)
    for distance in range(1, min(width, positions.shape[1])):
        neighbours[:, distance:] += positions[:, distance:] - positions[:, :-distance] == distance
    return neighbours


def last_neighbours(x: Tensor, width: int, neighbours: Tensor) -> Tensor:
    """The last ``width - 1`` of ``x`` (B, L, D), zeros where the last token does not know them."""
    last = F.pad(x, (0, 0, width - 1, 0))[:, x.shape[1] :]
    distances = torch.arange(width - 2, -1, -1, device=x.device)
    known = (neighbours[:, -1:] >= distances)[..., None]
    return torch.where(known, last, 0)


def step_size(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """``delta = softplus(dt + dt_bias)`` in the accumulation dtype, shape of ``dt`` (Mamba section 3.6)."""
    wide = _accumulator(dt)
    return F.softplus(dt.to(wide) + dt_bias.to(wide))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba-1 (design page, section 3), shapes as in the table above.

    ``initial`` (B, D, N) is the state before position 0 (zeros if None). Returns the gated output (B, L, D) in the
    dtype of ``x`` and the final state (B, D, N) in the accumulation dtype.
    """
    batch, length, channels = x.shape
    wide = _accumulator(x)
    x_, A_, B_, C_ = (t.to(wide) for t in (x, A, B, C))
    delta_ = step_size(dt, dt_bias)
    state = x_.new_zeros(batch, channels, A.shape[1]) if initial is None else initial.to(wide)
    outputs = []
    for t in range(length):
        decay = torch.exp(delta_[:, t, :, None] * A_)
        state = decay * state + (delta_[:, t] * x_[:, t])[:, :, None] * B_[:, t, None, :]
        outputs.append((state * C_[:, t, None, :]).sum(-1))
    unrolled = torch.stack(outputs, dim=1) if outputs else x_
    y = (unrolled + D.to(wide) * x_) * F.silu(z.to(wide))
    return y.to(x.dtype), state


scored_scan = None
"""This backend scans and scores one after the other."""


def global_impact(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C_boundary: Tensor,
    gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """Impact of every token on the boundary's output (Simba; design page, section 3).

    The boundary is the last token given. ``C_boundary`` (B, N) is its output vector, ``gate`` (B, D) a weight per
    channel (silu of the boundary's z) or None. ``reduce`` over channels: ``max``, ``absmax`` or ``l2``.
    Returns scores (B, L) in the accumulation dtype.
    """
    impact = impact_per_channel(x, step_size(dt, dt_bias), A, B, C_boundary)
    if gate is not None:
        impact = impact * gate.to(impact.dtype)[:, None, :]
    return reduce_channels(impact, reduce)


def reduce_channels(impact: Tensor, reduce: str) -> Tensor:
    """One score per token from impacts (B, L, D) per channel."""
    if reduce == "max":
        return impact.amax(-1)
    if reduce == "absmax":
        return impact.abs().amax(-1)
    if reduce == "l2":
        return impact.square().sum(-1).sqrt()
    raise ValueError(f"reduce must be max, absmax or l2, not {reduce!r}")


def impact_per_channel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor) -> Tensor:
    """``dy_b(t)[d] = sum_n C_b[n] exp(A[d,n] sum_{k=t+1..b} delta_k[d]) delta_t[d] B_t[n] x_t[d]`` as (B, L, D).

    Its sum over t, plus ``D x_b``, is the ungated output of the scan at the boundary. Holds (B, L, D, N) at once.
    """
    wide = _accumulator(x)
    x_, delta_, A_, B_, C_ = (t.to(wide) for t in (x, delta, A, B, C_boundary))
    later = delta_.flip(1).cumsum(1).flip(1) - delta_  # sum of the steps after t, t's own left out
    decay = torch.exp(later[..., None] * A_)
    weights = (decay * (B_ * C_[:, None, :])[:, :, None, :]).sum(-1)
    return weights * delta_ * x_


def ssd(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-2 (SSD, Dao & Gu 2024, equation 2 with scalar A per head), shapes as in the text above.

    ``initial`` (B, H, P, N) is the state before position 0 (zeros if None). ``chunk_size`` is for backends that work
    in chunks; there are none here. Returns the output (B, L, H, P), skip connection included and not gated, in the
    dtype of ``x``, and the final state (B, H, P, N) in the accumulation dtype.
    """
    batch, length, heads, width = x.shape
    wide = _accumulator(x)
    x_, A_, D_ = x.to(wide), A.to(wide), D.to(wide)
    B_, C_ = (t.to(wide).repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    delta_ = step_size(dt, dt_bias)
    state = x_.new_zeros(batch, heads, width, B.shape[3]) if initial is None else initial.to(wide)
    outputs = []
    for t in range(length):
        decay = torch.exp(delta_[:, t] * A_)
        added = (delta_[:, t, :, None] * x_[:, t])[..., None] * B_[:, t, :, None, :]
        state = decay[:, :, None, None] * state + added
        outputs.append((state * C_[:, t, :, None, :]).sum(-1) + D_[:, None] * x_[:, t])
    y = torch.stack(outputs, dim=1) if outputs else x_
    return y.to(x.dtype), state


def ssd_impact(
    x: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C_boundary: Tensor,
    gate: Tensor | None = None,
    reduce: str = "max",
) -> Tensor:
    """Impact of every token on the boundary's output in a Mamba-2 layer; arguments as in :func:`global_impact`.

    ``C_boundary`` (B, G, N), ``gate`` (B, H, P) or None; heads and their channels are reduced together.
    """
    impact = ssd_impact_per_channel(x, step_size(dt, dt_bias), A, B, C_boundary).flatten(2)
    if gate is not None:
        impact = impact * gate.to(impact.dtype).flatten(1)[:, None, :]
    return reduce_channels(impact, reduce)


def ssd_impact_per_channel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C_boundary: Tensor) -> Tensor:
    """``dy_b(t)[h,p] = sum_n C_b[n] exp(A[h] sum_{k=t+1..b} delta_k[h]) delta_t[h] B_t[n] x_t[h,p]`` as (B, L, H, P).

    With A a scalar per head it factorises into ``(C_b . B_t) exp(..) delta_t``, one number per head, times x.
    """
    wide = _accumulator(x)
    x_, delta_, A_, B_, C_ = (t.to(wide) for t in (x, delta, A, B, C_boundary))
    later = delta_.flip(1).cumsum(1).flip(1) - delta_
    match = (B_ * C_[:, None]).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=2)
    return (match * torch.exp(later * A_) * delta_)[..., None] * x_


def protected_scores(scores: Tensor, protected: int) -> Tensor:
    """``scores`` (B, L) in which the ``protected`` newest tokens win against everything and NaN loses against all."""
    scores = torch.nan_to_num(scores.detach(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    newest = torch.arange(scores.shape[1], device=scores.device) >= scores.shape[1] - protected
    return torch.where(newest, torch.inf, scores)


def select_tokens(scores: Tensor, k: int, protected: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``k`` highest of ``scores`` (B, L), the ``protected`` newest tokens always among them (protected <= k <= L).

    Ties go to the later token, NaN counts as -inf. Returns their indices, ascending, and what ``positions`` (B, L)
    int64 says of them (None: 0..L-1), both (B, k) int64.
    """
    backwards = protected_scores(scores, protected).flip(1)
    order = torch.sort(backwards, dim=1, descending=True, stable=True).indices[:, :k]
    chosen = (scores.shape[1] - 1 - order).sort(dim=1).values
    return chosen, chosen if positions is None else positions.gather(1, chosen)


def keep_tokens(hidden: Tensor, residual: Tensor, chosen: Tensor, present: int) -> tuple[Tensor, Tensor]:
    """Tokens ``chosen`` (B, k) of the first ``present`` of both streams (B, L, D), then all tokens after ``present``.

    ``chosen`` names no token twice. Returns the two streams (B, k + L - present, D) in their own dtypes.
    """
    index = chosen[:, :, None].expand(-1, -1, hidden.shape[2])
    hidden, residual = (
        torch.cat([stream[:, :present].gather(1, index), stream[:, present:]], dim=1) for stream in (hidden, residual)
    )
    return hidden, residual


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual add and RMS norm: ``r = residual + hidden`` (fp32 at least), ``normed = r / rms(r) * weight``.

    Returns ``normed`` in the dtype of ``weight`` and the new residual stream ``r``, both (B, L, D).
    """
    wide = _accumulator(hidden)
    residual = hidden.to(wide) if residual is None else residual + hidden.to(wide)
    inverse_rms = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    return (residual * inverse_rms * weight.to(wide)).to(weight.dtype), residual


def keep_add_rms_norm(
    hidden: Tensor, residual: Tensor, chosen: Tensor, present: int, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` of the tokens that :func:`keep_tokens` keeps: both outputs (B, k + L - present, D)."""
    return add_rms_norm(*keep_tokens(hidden, residual, chosen, present), weight, eps)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """``g / rms(g) * weight`` of the gated output ``g = y silu(z)`` of a Mamba-2 layer, all (B, L, D), weight (D,).

    The mean square is taken over each of ``groups`` equal runs of channels. Returns the dtype of ``y``.
    """
    wide = _accumulator(y)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
    inverse_rms = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return ((gated * inverse_rms).flatten(-2) * weight.to(wide)).to(y.dtype)


def cross_entropy(logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Mean over scored rows of ``logsumexp(logits) - logits[label]``, nats, a scalar in fp32 at least.

    ``logits`` (n, V), ``labels`` (n,) int64; rows whose label is ``ignored`` are not scored, none scored gives NaN.
    """
    return F.cross_entropy(logits.to(_accumulator(logits)), labels, ignore_index=ignored)
