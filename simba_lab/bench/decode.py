"""Decoding: tokens per second from a prefilled and pruned state, beside mamba-ssm's cached generation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from simba_lab.bench import models
from simba_lab.bench.floors import floor_of_sequence
from simba_lab.bench.lines import Line, Target, throughput
from simba_lab.bench.model_work import decoding_work
from simba_lab.bench.ops import missing, peer_name
from simba_lab.bench.session import Session
from simba_lab.bench.timing import Call, Timing, capture, time_calls
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.mamba import LayerState
from simba_lab.model.shapes import published_shape

# Tokens of one timed call, and what mamba-ssm generates beyond them to cancel its prefill by difference.
GENERATED = 64
_REPEATS = 7


@dataclass(frozen=True)
class DecodingCase:
    """``batch`` sequences decoded greedily after a context of ``n_context`` tokens."""

    name: str
    config: ModelConfig
    batch: int
    n_context: int = 1024
    target: Target = Target(1.0)

    @property
    def what(self) -> str:
        return f"decoding, {self.name}, batch {self.batch}"


def published_cases() -> dict[str, DecodingCase]:
    """The issue's two shapes and two batches by a short name."""
    return {
        f"{size}:{batch}": DecodingCase(size, published_shape(f"mamba-{size}"), batch)
        for size in ("130m", "1.4b")
        for batch in (1, 64)
    }


@torch.inference_mode()
def measure_decoding(case: DecodingCase, session: Session) -> list[Line]:
    """One line: tokens per second of all sequences together."""
    model = models.ours(case.config, session.device, torch.bfloat16, session.seed, session.backend).eval()
    tokens = models.random_tokens(case.config, (case.batch, case.n_context), session.device, session.seed + 1)
    step = GreedyStep(model.sparsified("global_impact", "linear", final_keep=0.1), tokens)
    stretch = time_calls([partial(_repeat, step.replay, GENERATED)], session.device, _REPEATS, queued=False)
    ours = Timing(*(ms / GENERATED for ms in _spread(stretch)), stretch.repeats)
    least = floor_of_sequence(decoding_work(case.config, case.batch), session.ceilings)
    reason = missing("mamba_ssm.models.mixer_seq_simple", "mamba-ssm")
    theirs = reason or _peer(case, model, tokens)
    return [throughput(case.what, case.batch, ours, peer_name("mamba-ssm"), theirs, case.target, least)]


class GreedyStep:
    """One greedy decoding step after a prefill, on tokens and states that stay where they are: captured on a GPU."""

    def __init__(self, model: LanguageModel, context: Tensor) -> None:
        before = model.prefill(context)
        self.model = model
        self.tokens = before.logits.argmax(-1)
        self.states = [LayerState(state.conv.clone(), state.ssm.clone()) for state in before.states]
        self.replay: Call = capture(self._step) if context.is_cuda else self._step

    @torch.inference_mode()
    def _step(self) -> None:
        logits, states = self.model.extend(self.tokens, self.states)
        self.tokens.copy_(logits.argmax(-1))
        for mine, after in zip(self.states, states, strict=True):
            mine.conv.copy_(after.conv)
            mine.ssm.copy_(after.ssm)


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _peer(case: DecodingCase, model: LanguageModel, tokens: Tensor) -> Timing:
    """Time of a token of ``generate(..., cg=True)``, greedy: what ``GENERATED`` more tokens cost."""
    peer = models.same_weights(models.mamba_ssm(case.config, model.device, torch.bfloat16), model).eval()
    short = case.n_context + 1 + GENERATED
    calls = [
        lambda length=length: peer.generate(tokens, max_length=length, cg=True, top_k=1)
        for length in (short + GENERATED, short)
    ]
    longer, shorter = (time_calls([call], model.device, _REPEATS, queued=False) for call in calls)
    parts = ((a - b) / GENERATED for a, b in zip(_spread(longer), _spread(shorter), strict=True))
    return Timing(*parts, longer.repeats)


def _spread(timing: Timing) -> tuple[float, float, float]:
    return timing.median, timing.low, timing.high
