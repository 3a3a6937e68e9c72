"""Does pruning save the time its FLOPs promise? Dense and pruned prefill of one model, timed in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from simba_lab.bench.machine import describe
from simba_lab.bench.peers import Shape
from simba_lab.kernels.cost import CONVENTION
from simba_lab.model import LanguageModel, ModelConfig


def compare_prefill(
    shape: Shape, n_context: int, criterion: str, final_keep: float, repeats: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Prefill of ``shape.batch`` contexts, dense and pruned linearly to ``final_keep``, scoring and selection included.

    The two run in turn, ``repeats`` times after a warm-up, so that a drift of the machine's speed meets both; the
    speed-up is the median of the ratios of neighbours. ``fraction`` is the speed-up over what FLOPs promise.
    """
    torch.manual_seed(0)
    config = ModelConfig(shape.d_model, shape.n_layer, shape.vocab_size, shape.d_state)
    dense = LanguageModel(config).eval()
    pruned = dense.sparsified(criterion, "linear", final_keep=final_keep)
    tokens = torch.randint(shape.vocab_size, (shape.batch, n_context))
    _seconds(dense, tokens), _seconds(pruned, tokens)
    pairs = []
    for repeat in range(repeats):
        progress(f"pair {repeat + 1} of {repeats}")
        pairs.append((_seconds(dense, tokens), _seconds(pruned, tokens)))
    promised = dense.flops(n_context, 0).total / pruned.flops(n_context, 0).total
    speedup = median(slow / fast for slow, fast in pairs)
    return {
        "shape": dataclasses.asdict(shape) | {"length": n_context},
        "criterion": criterion,
        "final_keep": final_keep,
        "backend": dense.backend.name,
        "dense_seconds": median(slow for slow, _ in pairs),
        "pruned_seconds": median(fast for _, fast in pairs),
        "speedup": speedup,
        "promised_by_flops": promised,
        "fraction": speedup / promised,
        "repeats": repeats,
        "convention": CONVENTION,
        "machine": describe(),
    }


@torch.inference_mode()
def _seconds(model: LanguageModel, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    model.prefill(tokens)
    return time.perf_counter() - started
