"""Quality of one checkpoint, dense and pruned in several ways, on held-out windows of its own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simba_lab.data import EvalWindows
from simba_lab.errors import InputError
from simba_lab.evaluate.statistics import mean_interval
from simba_lab.evaluate.windows import far_face, plain_face, score_windows
from simba_lab.model import LanguageModel

RESAMPLES = 2_000


def parse_arm(text: str, model: LanguageModel) -> LanguageModel:
    """The model as an arm of ``dense`` or ``schedule:criterion@mean_keep``; class paths work as names.

    ``+adjacent`` behind it lets convolutions read true neighbours only.

    Raises InputError that shows the form.
    """
    if text == "dense":
        return model.with_pruning(None)
    rest, plus, convolution = text.partition("+")
    names, _, keep = rest.partition("@")
    schedule, _, criterion = names.partition(":")
    try:
        mean_keep = float(keep)
    except ValueError:
        mean_keep = None
    if not (schedule and criterion and mean_keep is not None):
        form = "dense or schedule:criterion@mean_keep, e.g. linear:global_impact@0.55 or linear:norm@0.5+adjacent"
        raise InputError(f"arms: {text!r} should be {form}")
    return model.sparsified(criterion, schedule, mean_keep=mean_keep, convolution=convolution if plus else "compacted")


def evaluate_arms(
    model: LanguageModel,
    arms: Sequence[str],
    windows: EvalWindows,
    batch_size: int,
    reach: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One row per arm: quality (nats per token) with its 95 % interval over documents, far quality, FLOPs, seconds.

    ``far`` are tokens last seen more than ``reach`` tokens before the end of the context.
    """
    models = [(name, parse_arm(name, model)) for name in arms]
    rows = []
    for name, arm in models:
        scores = score_windows(arm, windows, batch_size)
        plain, far = plain_face(scores.nll, windows), far_face(scores.nll, windows, reach)
        estimate = mean_interval(
            plain.nll, plain.tokens, windows.document, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        )
        rows.append(
            {
                "name": name,
                "quality": plain.mean,
                "quality_interval": estimate.interval,
                "quality_far": far.mean,
                "far_tokens": int(far.tokens.sum()),
                "flops": scores.flops,
                "wall_seconds": scores.seconds,
                "keep_counts": arm.keep_counts(windows.n_context),
            }
        )
        say(f"{name}: {plain.mean:.4f} nats/token, {scores.seconds:.1f} s")
    return rows
