"""Decoding: tokens per second from a prefilled and pruned state, beside mamba-ssm's cached generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from simba_lab.bench import models
from simba_lab.bench.checks import require
from simba_lab.bench.floors import floor_of_sequence
from simba_lab.bench.lines import Line, Target, or_reason, throughput
from simba_lab.bench.model_work import decoding_work
from simba_lab.bench.ops import missing, peer_name
from simba_lab.bench.session import Session
from simba_lab.bench.timing import Timing, time_calls
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.lm import Output
from simba_lab.model.shapes import published_shape

# Tokens of one timed call, and what mamba-ssm generates beyond them to cancel its prefill by difference.
GENERATED = 64
_COMPARED = 8  # tokens, before anything is timed
_REPEATS = 5


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


@torch.no_grad()
def measure_decoding(case: DecodingCase, session: Session) -> list[Line]:
    """One line: tokens per second of all sequences together."""
    model = models.ours(case.config, session.device, torch.bfloat16, session.seed, session.backend).eval()
    tokens = models.random_tokens(case.config, (case.batch, case.n_context), session.device, session.seed + 1)
    sparse = model.sparsified("global_impact", "linear", final_keep=0.1)
    generate = _captured(sparse, tokens) if tokens.is_cuda else partial(_eager, sparse, sparse.prefill(tokens))
    compared = {"the tokens": generate(_COMPARED)}, {"the tokens": _eager(sparse, sparse.prefill(tokens), _COMPARED)}
    session.checks.append(require(f"{case.what}, captured against eager", *compared, 0.0))
    stretch = time_calls([partial(generate, GENERATED)], session.device, _REPEATS, queued=False)
    ours = Timing(*(ms / GENERATED for ms in _spread(stretch)), stretch.repeats)
    least = floor_of_sequence(decoding_work(case.config, case.batch), session.ceilings)
    reason = missing("mamba_ssm.models.mixer_seq_simple", "mamba-ssm")
    theirs = reason or or_reason("mamba-ssm", lambda: _peer(case, model, tokens))
    return [throughput(case.what, case.batch, ours, peer_name("mamba-ssm"), theirs, case.target, least)]


def _captured(model: LanguageModel, tokens: Tensor) -> Callable[[int], Tensor]:
    """Greedy decoding of n tokens after one pruned prefill, as users run it on a GPU."""
    prefill = model.captured(*tokens.shape)
    decoder = prefill.decoder()
    before = prefill(tokens).clone()
    return partial(decoder.generate, before.states, _most_likely(model, before.logits))


def _eager(model: LanguageModel, before: Output, n: int) -> Tensor:
    """The same without graphs: (batch, n) tokens."""
    chosen, states = [_most_likely(model, before.logits)], before.states
    for _ in range(n):
        logits, states = model.extend(chosen[-1], states)
        chosen.append(_most_likely(model, logits))
    return torch.cat(chosen[1:], dim=1)


def _most_likely(model: LanguageModel, logits: Tensor) -> Tensor:
    return logits[:, -1:, : model.config.vocab_size].argmax(-1)


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
