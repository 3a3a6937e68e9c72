"""One layer: norm, mixer and the state it carries between calls; the mixer of Mamba-1.

Parameter names are state-spaces' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba_lab.kernels import Backend
from simba_lab.kernels.cost import causal_conv, charge, linear, selective_scan
from simba_lab.model.config import ModelConfig
from simba_lab.pruning.signals import OwnImpact


@dataclass(frozen=True)
class LayerState:
    """What one layer carries from token to token: last inputs of the convolution and the state of the recurrence.

    Mamba-1: conv (B, W-1, D), ssm (B, D, N). Mamba-2: conv (B, W-1, D + 2 G N), ssm (B, H, P, N).
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True)
class MixerSignals:
    """What a mixer computed for all tokens it saw; names and shapes as in :class:`simba_lab.pruning.Signals`.

    ``z`` is a function of :meth:`Mixer.ungated`, which computes it only if it is called. ``scanned`` is of the tokens
    that were to be scored.
    """

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | Callable[[], Tensor]
    scanned: tuple[OwnImpact, Tensor] | None = None


@dataclass(frozen=True)
class Scored:
    """Tokens that a criterion will score after the scan: the first ``present``, by their ``impact`` on the last."""

    present: int
    impact: OwnImpact


@dataclass(frozen=True)
class Kept:
    """Tokens with which a layer goes on: ``chosen`` (B, k) of the first ``present``, and all after those."""

    chosen: Tensor
    present: int


class Projection(nn.Linear):
    """Matrix product, plus a bias if there is one, charged to the open ledger under its own name.

    ``bias_later`` leaves the bias to whoever consumes the output: the scan adds that of ``dt_proj``.
    """

    def __init__(
        self, name: str, layer: int, d_in: int, d_out: int, bias: bool = False, bias_later: bool = False
    ) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.op, self.layer, self.bias_later = name, layer, bias_later

    def reset_parameters(self) -> None:
        """Weights are set once, by the model's own initialisation."""

    def forward(self, x: Tensor, backend: Backend, rows: slice | None = None) -> Tensor:
        """``rows`` of the outputs alone, or all."""
        weight, bias = self.weight, None if self.bias_later else self.bias
        if rows is not None:
            weight, bias = weight[rows], None if bias is None else bias[rows]
        out = backend.linear(x, weight)
        charge(self.layer, self.op, linear(x.numel() // self.in_features, self.in_features, len(weight)), out)
        return out if bias is None else out + bias.to(out.dtype)


class RMSNorm(nn.Module):
    """Residual addition and RMS norm: (normed, new residual stream), the stream in fp32 at least."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps

    def forward(
        self, hidden: Tensor, residual: Tensor | None, backend: Backend, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        if kept is None:
            return backend.add_rms_norm(hidden, residual, self.weight, self.eps)
        return backend.keep_add_rms_norm(hidden, residual, kept.chosen, kept.present, self.weight, self.eps)


class Convolution(nn.Module):
    """Parameters of a mixer's causal convolution, named as in ``nn.Conv1d``: weight (D, 1, W), bias (D,) or None."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, config.d_conv))
        self.register_parameter("bias", nn.Parameter(torch.empty(channels)) if config.conv_bias else None)

    @property
    def shift(self) -> Tensor:
        """What the kernels add per channel (D,): the bias, or zeros."""
        return self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias


class Mixer(nn.Module):
    """The selective state-space mixer (Mamba, Gu & Dao 2023, figure 3). One form serves prefill, pass and step.

    Input and output (B, L, d_model). With a :class:`LayerState` it continues where that state ended, so that a step is
    a call with L = 1. ``neighbours`` (B, L), where tokens are missing, as in the reference's ``neighbour_conv``.
    """

    frozen_A: Tensor | None = None
    """Used for A while it is set: a captured graph need not compute A again at every replay."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        inner, states, rank = config.d_inner, config.d_state, config.rank
        self.layer, self.split = layer, (rank, states, states)
        self.in_proj = Projection("in_proj", layer, config.d_model, 2 * inner, config.bias)
        self.conv1d = Convolution(inner, config)
        self.x_proj = Projection("x_proj", layer, inner, rank + 2 * states)
        self.dt_proj = Projection("dt_proj", layer, rank, inner, bias=True, bias_later=True)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Projection("out_proj", layer, inner, config.d_model, config.bias)

    @property
    def dt_bias(self) -> Tensor:
        """Added to dt before the softplus (d_inner,)."""
        return self.dt_proj.bias

    @property
    def A(self) -> Tensor:
        """State matrix (d_inner, d_state), negative, fp32 at least."""
        return negative_exp(self.A_log) if self.frozen_A is None else self.frozen_A

    @property
    def channel_norms(self) -> Tensor:
        """How far one unit of each channel moves the residual stream (d_inner,), fp32 at least."""
        return column_norms(self.out_proj.weight)

    def forward(
        self, hidden: Tensor, backend: Backend, state: LayerState | None = None, neighbours: Tensor | None = None,
        scored: Scored | None = None,
    ) -> tuple[Tensor, LayerState, MixerSignals]:  # fmt: skip
        signals, conv = self.signals(hidden, backend, state, neighbours)
        x, dt, B, C, z = signals.x, signals.dt, signals.B, signals.C, signals.z
        inputs = (x, dt, self.dt_proj.bias, self.A, B, C, self.D, z, state.ssm if state else None)
        if scored is None or backend.scored_scan is None:
            y, ssm = backend.selective_scan(*inputs)
        else:
            weight = F.silu(z[:, scored.present - 1].detach()) if scored.impact.gated else None
            y, ssm, scores = backend.scored_scan(*inputs, weight, scored.present, scored.impact.reduce)
            signals = replace(signals, scanned=(scored.impact, scores))
        tokens = hidden.shape[0] * hidden.shape[1]
        charge(self.layer, "selective_scan", selective_scan(tokens, *self.A_log.shape), y)
        return self.out_proj(y, backend), LayerState(conv, ssm), signals

    def signals(
        self, hidden: Tensor, backend: Backend, state: LayerState | None = None, neighbours: Tensor | None = None
    ) -> tuple[MixerSignals, Tensor]:
        """What goes into the scan, and the last inputs of the convolution."""
        x, z = self.in_proj(hidden, backend).chunk(2, dim=-1)
        inputs, conv = self._inputs(x, backend, state, neighbours)
        return MixerSignals(*inputs, z), conv

    def ungated(self, hidden: Tensor, backend: Backend, neighbours: Tensor | None = None) -> MixerSignals:
        """:meth:`signals` of tokens from which no output is wanted: their gate is not computed unless it is read."""
        inner = self.in_proj.out_features // 2
        inputs, _ = self._inputs(self.in_proj(hidden, backend, slice(inner)), backend, None, neighbours)
        return MixerSignals(*inputs, lambda: self.in_proj(hidden, backend, slice(inner, None)))

    def _inputs(
        self, x: Tensor, backend: Backend, state: LayerState | None, neighbours: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
        """x, dt, B and C of the scan, and the last inputs of the convolution."""
        weight = self.conv1d.weight[:, 0]
        x, conv = convolved(x, weight, self.conv1d.shift, backend, state, neighbours)
        charge(self.layer, "causal_conv", causal_conv(x.shape[0] * x.shape[1], *weight.shape), x)
        dt, B, C = self.x_proj(x, backend).split(self.split, dim=-1)
        return (x, self.dt_proj(dt, backend), B, C), conv

    @torch.no_grad()
    def initialise(self, config: ModelConfig, generator: torch.Generator) -> None:
        """Mamba's own (section 3.6, appendix): A real S4D, log-uniform steps."""
        uniform_linear(self.in_proj.weight, config.d_model, generator)
        uniform_linear(self.x_proj.weight, config.d_inner, generator)
        initialise_conv_and_output(self, config, generator)
        bound = config.rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        self.dt_proj.bias.copy_(inverse_softplus(initial_steps(config, config.d_inner, generator)))
        self.A_log.copy_(torch.log(torch.arange(1, config.d_state + 1, dtype=torch.float32)).expand_as(self.A_log))
        self.D.fill_(1.0)


def convolved(
    x: Tensor, weight: Tensor, shift: Tensor, backend: Backend, state: LayerState | None, neighbours: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolution and SiLU of all tokens, or of true neighbours only; and the last inputs, to continue from."""
    if neighbours is None:
        return backend.causal_conv(x, weight, shift, state.conv if state else None)
    return backend.neighbour_conv(x, weight, shift, neighbours)


def negative_exp(A_log: Tensor) -> Tensor:
    """``-exp(A_log)``, fp32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def column_norms(weight: Tensor) -> Tensor:
    """L2 norms of the columns of a matrix (M, D), fp32 at least."""
    return torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))


class Block(nn.Module):
    """Residual add, norm, mixer: (hidden, residual) in and out, the residual stream in fp32 at least.

    With ``kept`` the others of the tokens that come in are dropped first; ``scored`` is what the mixer may find for a
    criterion on its way. An ``mlp`` takes the normed sum of the stream
    and the mixer's output; what both add is one ``hidden``, in the precision of the stream, so that the residual that
    comes out is what the layer saw, with an MLP or without.
    """

    def __init__(self, config: ModelConfig, mixer: nn.Module, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = mixer
        self.norm2 = None if mlp is None else RMSNorm(config.d_model, config.norm_eps)
        self.mlp = mlp

    def forward(
        self, hidden: Tensor, residual: Tensor | None, backend: Backend, state: LayerState | None = None,
        neighbours: Tensor | None = None, kept: Kept | None = None, scored: Scored | None = None,
    ) -> tuple[Tensor, Tensor, LayerState, MixerSignals]:  # fmt: skip
        normed, residual = self.norm(hidden, residual, backend, kept)
        hidden, state, signals = self.mixer(normed, backend, state, neighbours, scored)
        if self.mlp is not None:
            normed, _ = self.norm2(hidden, residual, backend)
            hidden = hidden.to(residual.dtype) + self.mlp(normed, backend)
        return hidden, residual, state, signals

    @torch.no_grad()
    def initialise(self, config: ModelConfig, generator: torch.Generator) -> None:
        self.norm.weight.fill_(1.0)
        self.mixer.initialise(config, generator)
        if self.mlp is not None:
            self.norm2.weight.fill_(1.0)
            self.mlp.initialise(config, generator)


@torch.no_grad()
def initialise_conv_and_output(mixer: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """What both generations share: torch's own convolution, a scaled output projection, biases of zero."""
    uniform_linear(mixer.conv1d.weight, config.d_conv, generator)
    if config.conv_bias:
        uniform_linear(mixer.conv1d.bias, config.d_conv, generator)
    if config.bias:
        mixer.in_proj.bias.zero_()
        mixer.out_proj.bias.zero_()
    # The variance is divided by the number of additions to the residual stream (GPT-2's rule).
    uniform_linear(mixer.out_proj.weight, config.d_inner, generator)
    mixer.out_proj.weight.div_(math.sqrt(config.n_additions))


def initial_steps(config: ModelConfig, count: int, generator: torch.Generator) -> Tensor:
    """``count`` step sizes, log-uniform in [dt_min, dt_max] and raised to dt_init_floor (Mamba, section 3.6)."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    return torch.exp(low + (high - low) * torch.rand(count, generator=generator)).clamp(min=config.dt_init_floor)


def inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def uniform_linear(weight: Tensor, fan_in: int, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(fan_in): what torch gives linear and convolution layers."""
    bound = fan_in**-0.5
    weight.uniform_(-bound, bound, generator=generator)
