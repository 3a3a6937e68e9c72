"""The gated MLP that may follow a mixer: channels of one token among themselves, nothing between tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simba_lab.kernels import Backend
from simba_lab.model.config import ModelConfig
from simba_lab.model.mamba import Projection, uniform_linear


class GatedMLP(nn.Module):
    """``fc2(y silu(gate))`` with ``y, gate = fc1(x)``, (B, L, d_model) in and out; names are state-spaces' own.

    A GLU variant (Shazeer 2020, "SwiGLU"), with the gate in the second half.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.fc1 = Projection("fc1", layer, config.d_model, 2 * config.d_mlp)
        self.fc2 = Projection("fc2", layer, config.d_mlp, config.d_model)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        y, gate = self.fc1(x, backend).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate), backend)

    @torch.no_grad()
    def initialise(self, config: ModelConfig, generator: torch.Generator) -> None:
        """Torch's own, the output scaled like the mixer's."""
        uniform_linear(self.fc1.weight, config.d_model, generator)
        uniform_linear(self.fc2.weight, config.d_mlp, generator)
        self.fc2.weight.div_(math.sqrt(config.n_additions))
