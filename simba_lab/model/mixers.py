"""Which mixer a config asks for: the one place where the generations of Mamba part."""

from __future__ import annotations

from simba_lab.model.config import ModelConfig
from simba_lab.model.mamba import Mixer
from simba_lab.model.mamba2 import Mamba2Mixer

MIXERS: dict[str, type[Mixer] | type[Mamba2Mixer]] = {"mamba1": Mixer, "mamba2": Mamba2Mixer}


def make_mixer(config: ModelConfig, layer: int) -> Mixer | Mamba2Mixer:
    """The mixer of one layer, its weights unset."""
    return MIXERS[config.layer](config, layer)
