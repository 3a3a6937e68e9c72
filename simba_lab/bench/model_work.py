"""The least work of a whole model, op by op: what the floors of prefill, training and decoding are made from."""

from __future__ import annotations

from collections.abc import Sequence

from simba_lab.bench.floors import Work
from simba_lab.model import ModelConfig

_STREAM = 4  # bytes of a number in the residual stream


def layer_work(config: ModelConfig, tokens: int, scored: bool, itemsize: int) -> list[Work]:
    """Ops of one Mamba-1 layer on ``tokens`` tokens, one after the other; ``scored`` adds global impact."""
    width, inner, states, rank = config.d_model, config.d_inner, config.d_state, config.rank
    cells = tokens * inner
    works = [
        Work(tokens * width * (2 * itemsize + 2 * _STREAM)),  # residual add and norm
        _product(tokens, width, 2 * inner, itemsize),
        Work(2 * cells * itemsize, flops=2 * config.d_conv * cells, exps=2 * cells),
        _product(tokens, inner, rank + 2 * states, itemsize),
        _product(tokens, rank, inner, itemsize),
        Work(4 * cells * itemsize, flops=9 * cells * states, exps=cells * (states + 3)),
        _product(tokens, inner, width, itemsize),
    ]
    if scored:
        works.append(Work(2 * cells * itemsize, flops=4 * cells * states, exps=cells * (states + 2)))
    return works


def _product(rows: int, d_in: int, d_out: int, itemsize: int) -> Work:
    return Work(itemsize * (rows * (d_in + d_out) + d_in * d_out), matrix_flops=2 * rows * d_in * d_out)


def prefill_work(config: ModelConfig, counts: Sequence[int], batch: int, itemsize: int = 2) -> list[Work]:
    """All layers, layer l on ``counts[l]`` tokens of each of ``batch`` sequences; scored where the next has fewer."""
    works = []
    for layer, count in enumerate(counts):
        fewer = layer + 1 < len(counts) and counts[layer + 1] < count
        works += layer_work(config, batch * count, fewer, itemsize)
    return works


def training_work(config: ModelConfig, batch: int, length: int, itemsize: int = 2) -> list[Work]:
    """A dense training step: everything three times, forward and twice as much backward; AdamW's own bytes left out."""
    tokens = batch * length
    head = _product(tokens, config.d_model, config.padded_vocab_size, itemsize)
    return 3 * [*prefill_work(config, [length] * config.n_layer, batch, itemsize), head]


def decoding_work(config: ModelConfig, batch: int, itemsize: int = 2) -> list[Work]:
    """One token of each sequence: weights read once, every state read and written in fp32."""
    state = batch * config.d_inner * config.d_state * 4
    per_layer = [*layer_work(config, batch, False, itemsize), Work(2 * state)]
    return [*(per_layer * config.n_layer), _product(batch, config.d_model, config.padded_vocab_size, itemsize)]
