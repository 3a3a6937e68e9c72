"""The Mamba-2 mixer (SSD; Dao & Gu 2024) and its initialisation. Parameter names are state-spaces' own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simba_lab.kernels import Backend
from simba_lab.kernels.cost import causal_conv, charge, ssd
from simba_lab.model.config import ModelConfig
from simba_lab.model.mamba import (
    Convolution,
    LayerState,
    MixerSignals,
    Projection,
    Scored,
    column_norms,
    convolved,
    initial_steps,
    initialise_conv_and_output,
    inverse_softplus,
    negative_exp,
    uniform_linear,
)

A_RANGE = (1.0, 16.0)
"""-A is drawn from here, uniformly, one number per head (``A_init_range`` of state-spaces)."""


class GatedNorm(nn.Module):
    """RMS norm of ``y silu(z)`` over each group's channels (``norm_before_gate=False`` of state-spaces)."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, z: Tensor, backend: Backend) -> Tensor:
        return backend.gated_rms_norm(y, z, self.weight, self.eps, self.groups)


class Mamba2Mixer(nn.Module):
    """The Mamba-2 mixer in its sequential-projection form (section 7.1). One form serves prefill, pass and step.

    One projection gives gate z, x, B, C and the step of each head; x, B and C pass the convolution together. H heads
    of P channels have one step size, A and D each; G groups of heads share B and C. Input and output (B, L, d_model).
    State: conv (B, W-1, D + 2 G N), ssm (B, H, P, N).
    """

    frozen_A: Tensor | None = None
    """As in Mamba-1."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        inner, heads, shared = config.d_inner, config.nheads, 2 * config.ngroups * config.d_state
        self.layer, self.chunk_size = layer, config.chunk_size
        self.heads, self.groups = (heads, config.headdim), (config.ngroups, config.d_state)
        self.split = (inner, inner + shared, heads)
        self.in_proj = Projection("in_proj", layer, config.d_model, sum(self.split), config.bias)
        self.conv1d = Convolution(inner + shared, config)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedNorm(inner, config.ngroups, config.norm_eps)
        self.out_proj = Projection("out_proj", layer, inner, config.d_model, config.bias)

    @property
    def A(self) -> Tensor:
        """One number per head (H,), negative, fp32 at least."""
        return negative_exp(self.A_log) if self.frozen_A is None else self.frozen_A

    @property
    def channel_norms(self) -> Tensor:
        """As in Mamba-1, times the weight of the norm on the way."""
        return column_norms(self.out_proj.weight) * self.norm.weight.abs()

    def forward(
        self, hidden: Tensor, backend: Backend, state: LayerState | None = None, neighbours: Tensor | None = None,
        scored: Scored | None = None,
    ) -> tuple[Tensor, LayerState, MixerSignals]:  # fmt: skip
        """As in Mamba-1, but ``scored`` is left to the criterion: its cost is no power of two per state here."""
        signals, conv = self.signals(hidden, backend, state, neighbours)
        x, dt, B, C, initial = signals.x, signals.dt, signals.B, signals.C, state.ssm if state else None
        y, ssm = backend.ssd(
            x.unflatten(-1, self.heads), dt, self.dt_bias, self.A, B, C, self.D, initial, self.chunk_size
        )
        charge(self.layer, "ssd", ssd(hidden.shape[0] * hidden.shape[1], x.shape[-1], self.groups[1]), y)
        y = self.norm(y.flatten(-2), signals.z, backend)
        return self.out_proj(y, backend), LayerState(conv, ssm), signals

    def signals(
        self, hidden: Tensor, backend: Backend, state: LayerState | None = None, neighbours: Tensor | None = None
    ) -> tuple[MixerSignals, Tensor]:
        """As in Mamba-1."""
        z, xBC, dt = self.in_proj(hidden, backend).split(self.split, dim=-1)
        inputs, conv = self._inputs(xBC, dt, backend, state, neighbours)
        return MixerSignals(*inputs, z), conv

    def ungated(self, hidden: Tensor, backend: Backend, neighbours: Tensor | None = None) -> MixerSignals:
        """As in Mamba-1."""
        inner, *rest = self.split
        xBC, dt = self.in_proj(hidden, backend, slice(inner, None)).split(rest, dim=-1)
        inputs, _ = self._inputs(xBC, dt, backend, None, neighbours)
        return MixerSignals(*inputs, lambda: self.in_proj(hidden, backend, slice(inner)))

    def _inputs(
        self, xBC: Tensor, dt: Tensor, backend: Backend, state: LayerState | None, neighbours: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:  # fmt: skip
        weight = self.conv1d.weight[:, 0]
        xBC, conv = convolved(xBC, weight, self.conv1d.shift, backend, state, neighbours)
        charge(self.layer, "causal_conv", causal_conv(xBC.shape[0] * xBC.shape[1], *weight.shape), xBC)
        (heads, width), (groups, states) = self.heads, self.groups
        x, B, C = xBC.split((heads * width, groups * states, groups * states), dim=-1)
        return (x, dt, B.unflatten(-1, self.groups), C.unflatten(-1, self.groups)), conv

    @torch.no_grad()
    def initialise(self, config: ModelConfig, generator: torch.Generator) -> None:
        """As published: A uniform, steps log-uniform, the rest as in Mamba-1."""
        uniform_linear(self.in_proj.weight, config.d_model, generator)
        initialise_conv_and_output(self, config, generator)
        self.dt_bias.copy_(inverse_softplus(initial_steps(config, config.nheads, generator)))
        low, high = A_RANGE
        self.A_log.copy_(torch.log(low + (high - low) * torch.rand(config.nheads, generator=generator)))
        self.D.fill_(1.0)
        self.norm.weight.fill_(1.0)
