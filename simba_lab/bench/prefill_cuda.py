"""Prefill of whole models: ours, dense and pruned, replayed as CUDA graphs, beside mamba-ssm as its users run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from simba_lab.bench import models
from simba_lab.bench.checks import require
from simba_lab.bench.floors import Ceilings, Floor, floor_of_sequence
from simba_lab.bench.lines import Line, Target, beside, or_reason, timed
from simba_lab.bench.model_work import prefill_work
from simba_lab.bench.ops import missing, peer_name
from simba_lab.bench.session import Session
from simba_lab.bench.timing import Call, Timing, capture, time_calls
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.captured import frozen_matrices
from simba_lab.model.shapes import published_shape

# Two bf16 models of the same weights drift apart by rounding, layer by layer; a wrong op is off by its whole size.
_SAME_MODEL = 5e-2
FINAL_KEEP = 0.1
# Layers between two cuts of the schedule that scores seldom.
_SELDOM = 4


@dataclass(frozen=True)
class PrefillCase:
    """A shape and what is aimed at: ``promise`` of FLOPs, ``scoring`` and ``choosing`` as shares of the dense time."""

    name: str
    config: ModelConfig
    batch: int
    length: int
    dense: Target = Target(1.0)
    promise: Target | None = None
    scoring: Target | None = None
    choosing: Target | None = None

    @property
    def what(self) -> str:
        return f"{self.name} {self.batch} x {self.length}"


def published_cases() -> dict[str, PrefillCase]:
    """The issue's table by a short name."""
    held = {"promise": Target(0.95)}
    shares = {"scoring": Target(0.02, at_most=True), "choosing": Target(0.04, at_most=True)}
    small, middle, large = (published_shape(f"mamba-{size}") for size in ("130m", "1.4b", "2.8b"))
    second = published_shape("mamba2-2.7b")
    cases = [
        PrefillCase("130m", small, 1, 2048, dense=Target(3.0)),
        PrefillCase("130m", small, 8, 2048),
        PrefillCase("1.4b", middle, 8, 2048, **held),
        PrefillCase("1.4b", middle, 1, 16384, **held),
        PrefillCase("2.8b", large, 8, 2048, **held, **shares),
        PrefillCase("2.8b", large, 1, 16384, **held, **shares),
        PrefillCase("mamba2-2.7b", second, 8, 2048, **held),
        PrefillCase("mamba2-2.7b", second, 1, 16384, **held),
    ]
    return {case.what.replace(" x ", "x").replace(" ", ":"): case for case in cases}


@torch.no_grad()
def measure_prefill(case: PrefillCase, session: Session) -> Iterator[Line]:
    """Dense beside mamba-ssm, pruned beside what FLOPs promise, and the shares of scoring and selection."""
    model = models.ours(case.config, session.device, torch.bfloat16, session.seed, session.backend).eval()
    tokens = models.random_tokens(case.config, (case.batch, case.length), session.device, session.seed + 1)
    time = partial(_time, device=session.device, repeats=session.repeats)
    dense = time(_replayed(f"{case.what}, dense", model, tokens, session))
    yield from _dense_lines(case, model, tokens, dense, time, session)
    yield from _pruned_lines(case, model, tokens, dense, time, session)


def _dense_lines(
    case: PrefillCase, model: LanguageModel, tokens: Tensor, dense: Timing, time: Callable[[Call], Timing],
    session: Session,
) -> Iterator[Line]:  # fmt: skip
    """Ours beside mamba-ssm's backbone as its users call it, and beside that captured as ours is."""
    name, least = peer_name("mamba-ssm"), _floor(case, [case.length] * case.config.n_layer, session.ceilings)
    what = f"{case.what}, dense"
    reason = missing("mamba_ssm.models.mixer_seq_simple", "mamba-ssm")
    if reason is not None:
        yield beside(what, dense, name, reason, case.dense, least)
        return
    peer = models.same_weights(models.mamba_ssm(case.config, model.device, torch.bfloat16), model).eval()
    session.checks.append(_same_model(case, model, peer, tokens))
    forward = partial(peer.backbone, tokens)
    yield beside(what, dense, name, or_reason(name, lambda: time(forward)), case.dense, least)
    if model.device.type == "cuda":
        graph = or_reason(name, lambda: time(capture(forward)))
        yield beside(f"{what}, the peer captured too", dense, name, graph)


def _same_model(case: PrefillCase, model: LanguageModel, peer: nn.Module, tokens: Tensor) -> dict[str, object]:
    theirs = peer(tokens, num_last_tokens=1).logits
    return require(
        f"{case.what}, ours and mamba-ssm's logits in bf16",
        {"the logits": model.prefill(tokens).logits},
        {"the logits": theirs},
        _SAME_MODEL,
    )


def _floor(case: PrefillCase, counts: Sequence[int], ceilings: Ceilings) -> Floor | None:
    """Of Mamba-1 layers; the least work of the others is not written down."""
    if case.config.layer != "mamba1":
        return None
    return floor_of_sequence(prefill_work(case.config, counts, case.batch), ceilings)


def _pruned_lines(
    case: PrefillCase, model: LanguageModel, tokens: Tensor, dense: Timing, time: Callable[[Call], Timing],
    session: Session,
) -> Iterator[Line]:  # fmt: skip
    pruned, seldom = (_linear(model, "global_impact", every) for every in (1, _SELDOM))
    impact = time(_replayed(f"{case.what}, pruned", pruned, tokens, session))
    recency = time(_replayed(f"{case.what}, pruned by recency", _linear(model, "recency", 1), tokens, session))
    slicing = time(_free_choice(model, tokens, pruned.keep_counts(case.length)))
    what = f"{case.what}, pruned linearly to {FINAL_KEEP:.0%} by global impact"
    yield _promise_line(case, what, model, pruned, dense, impact, session, slicing)
    rarely = time(_replayed(f"{case.what}, pruned seldom", seldom, tokens, session))
    what += f", every {_SELDOM} layers"
    yield _promise_line(case, what, model, seldom, dense, rarely, session, None)
    for part, without, target in (
        ("scoring", recency, case.scoring),
        ("scoring, selection and gather", slicing, case.choosing),
    ):
        share = (impact.median - without.median) / dense.median
        note = f"{impact.median:.3f} - {without.median:.3f} ms of {dense.median:.3f} ms dense"
        yield Line(
            f"{case.what}, {part}", ours=impact.median - without.median, figure=share, figure_kind="share",
            target=target, note=note,
        )  # fmt: skip


def _linear(model: LanguageModel, criterion: str, every: int) -> LanguageModel:
    init_args = {"final_keep": FINAL_KEEP, "every": every}
    return model.sparsified(criterion, {"class_path": "linear", "init_args": init_args})


def _promise_line(
    case: PrefillCase, what: str, model: LanguageModel, pruned: LanguageModel, dense: Timing, measured: Timing,
    session: Session, slicing: Timing | None,
) -> Line:  # fmt: skip
    """The speed-up over our own dense beside the one that FLOPs promise."""
    promised = model.flops(case.length, 0).total / pruned.flops(case.length, 0).total
    speedup = dense.median / measured.median
    note = f"{speedup:.2f}x our dense, FLOPs promise {promised:.2f}x"
    if slicing is not None:
        note += f"; free slicing {dense.median / slicing.median:.2f}x"
    return timed(
        what, measured, _floor(case, pruned.keep_counts(case.length), session.ceilings), figure=speedup / promised,
        figure_kind="promise", target=case.promise, note=note,
    )  # fmt: skip


def _sliced(model: LanguageModel, tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """The pruned pass with tokens chosen for free: every layer simply gets the newest ones."""
    backend = model.backend
    hidden, residual = model.backbone.embedding(tokens), None
    for block, count in zip(model.backbone.layers, counts, strict=True):
        hidden = hidden[:, -count:]
        residual = None if residual is None else residual[:, -count:]
        hidden, residual, _, _ = block(hidden, residual, backend)
    normed, _ = model.backbone.norm_f(hidden[:, -1:], residual[:, -1:], backend)
    return model.lm_head(normed, backend)


def _free_choice(model: LanguageModel, tokens: Tensor, counts: Sequence[int]) -> Call:
    """:func:`_sliced`, captured on a CUDA device as prefill is: with A computed before, and kept for the graph."""
    call = partial(_sliced, model, tokens, counts)
    if model.device.type != "cuda":
        return call
    with frozen_matrices(model) as matrices:
        replay = capture(call)
    return lambda _matrices=matrices: replay()


def _replayed(what: str, model: LanguageModel, tokens: Tensor, session: Session) -> Call:
    """Prefill as users run it: a captured graph on a CUDA device, its logits compared with a plain call's first."""
    if model.device.type != "cuda":
        return lambda: model.prefill(tokens)
    captured = model.captured(*tokens.shape)
    compared = {"the logits": captured(tokens).logits.clone()}, {"the logits": model.prefill(tokens).logits}
    session.checks.append(require(f"{what}, captured against eager", *compared, _SAME_MODEL))
    return lambda: captured(tokens)


def _time(call: Call, device: torch.device, repeats: int) -> Timing:
    return time_calls([call], device, repeats, queued=False)
