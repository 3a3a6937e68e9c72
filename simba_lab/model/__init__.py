"""The language model, dense and pruned."""

from simba_lab.model.captured import CapturedDecoder, CapturedPrefill
from simba_lab.model.config import ModelConfig
from simba_lab.model.cost import Breakdown, forward_flops
from simba_lab.model.lm import LanguageModel, Output
from simba_lab.model.mamba import LayerState

__all__ = [
    "Breakdown",
    "CapturedDecoder",
    "CapturedPrefill",
    "LanguageModel",
    "LayerState",
    "ModelConfig",
    "Output",
    "forward_flops",
]
