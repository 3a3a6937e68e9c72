"""Log-likelihood of continuations after contexts: contexts pruned at their last token, continuations dense.

Works on token ids. No token is computed twice that several pairs may share (:mod:`simba_lab.evaluate.prefixes`).
Segments of equal length run together, so that no state ever sees padding; segments after which nothing comes may be
padded a little on the right, where nothing that is scored can see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from simba_lab.evaluate.prefixes import LONGEST_SCORED, Segment, Target, plan_segments
from simba_lab.evaluate.scoring import Pair
from simba_lab.model import LanguageModel, LayerState

ROWS_PER_CONTEXT = 8
"""Continuations are short: so many times more of them than contexts run together, and so many states wait for them."""
CACHED = 2**18
"""Logits that a processor's cache holds with room to spare."""
FULLNESS = 15 / 16
"""Segments that need not be of equal length run together if none is shorter than this share of the longest."""

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have produced it."""

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score_pairs(model: LanguageModel, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Score]]:
    """(index, score) of every pair as soon as it is known, roughly longest contexts first.

    ``batch_size`` contexts run at a time. Logits are taken over the whole (padded) vocabulary of the model, as in
    training.
    """
    yield from _run(model, plan_segments(pairs, model.pruning is None), None, batch_size, _Tally(pairs))


def score_documents(
    model: LanguageModel, documents: Mapping[int, Sequence[Pair]], batch_size: int
) -> Iterator[tuple[int, float]]:
    """(key, log-likelihood in nats) of documents that consist of pairs, as soon as the last of them is scored."""
    owners = [key for key, pairs in documents.items() for _ in pairs]
    missing, total = Counter(owners), dict.fromkeys(documents, 0.0)
    yield from ((key, 0.0) for key, pairs in documents.items() if not pairs)
    for pair, score in score_pairs(model, [pair for pairs in documents.values() for pair in pairs], batch_size):
        key = owners[pair]
        total[key] += score.log_likelihood
        missing[key] -= 1
        if not missing[key]:
            yield key, total[key]


def _run(
    model: LanguageModel, siblings: Sequence[Segment], states: list[LayerState] | None, batch_size: int, tally: _Tally
) -> Iterator[tuple[int, Score]]:
    """Feed segments after the ``states`` of their parents, None for roots, and then what follows them.

    The states of ``ROWS_PER_CONTEXT * batch_size`` segments at most are held on each level of the forest.
    """
    most = ROWS_PER_CONTEXT * batch_size
    for group in chunks(sorted(siblings, key=_long_first), most):
        after = []
        for batch in _batches(group, batch_size if states is None else most):
            tokens = _padded([segment.tokens for segment in batch]).to(model.device)
            logits, ended = _feed(model, tokens, states, batch)
            yield from tally.add(logits, _wanted(batch, tokens.shape[1] - logits.shape[1]))
            if batch[0].children:
                after.append(ended)
        yield from _run_below(model, group, after, batch_size, tally)


def _run_below(
    model: LanguageModel, group: Sequence[Segment], after: Sequence[list[LayerState]], batch_size: int, tally: _Tally
) -> Iterator[tuple[int, Score]]:
    """Feed the children of a group; ``after`` are the states in which those of its batches ended that have any."""
    parents = [segment for segment in group if segment.children]
    for row, parent in enumerate(parents):
        for child in parent.children:
            child.row = row
    children = [child for parent in parents for child in parent.children]
    if children:
        yield from _run(model, children, _joined(after), batch_size, tally)


def _long_first(segment: Segment) -> tuple[bool, int]:
    """Those with children first: their states are joined in this order."""
    return not segment.children, -len(segment.tokens)


def _batches(segments: Sequence[Segment], most: int) -> Iterator[list[Segment]]:
    """Runs of up to ``most`` sorted segments that go together, holding few enough logits."""
    batch: list[Segment] = []
    for segment in segments:
        if batch and not _fits(segment, batch, most):
            yield batch
            batch = []
        batch.append(segment)
    if batch:
        yield batch


def _fits(segment: Segment, batch: Sequence[Segment], most: int) -> bool:
    longest, length = len(batch[0].tokens), len(segment.tokens)
    if bool(segment.children) != bool(batch[0].children) or len(batch) == most:
        return False
    if length < (FULLNESS * longest if segment.padded else longest):
        return False
    scored = max(other.n_scored + longest - len(other.tokens) for other in (*batch, segment))
    return scored * (len(batch) + 1) <= LONGEST_SCORED


def _feed(
    model: LanguageModel, tokens: Tensor, states: list[LayerState] | None, batch: Sequence[Segment]
) -> tuple[Tensor, list[LayerState]]:
    """Logits (B, n, V) of the last n of ``tokens`` (B, L), all that the batch wants, and the states at the end."""
    length = tokens.shape[1]
    n_scored = max(segment.n_scored + length - len(segment.tokens) for segment in batch)
    if states is None:
        # A pruned root is a whole context: n_scored is 1.
        out = model(tokens, n_context=length - n_scored + 1)
        return out.logits, out.states
    index = torch.tensor([segment.row for segment in batch], device=tokens.device)
    return model.extend(tokens, rows_of(states, index), n_scored)


def _wanted(batch: Sequence[Segment], skipped: int) -> Iterator[tuple[int, Target]]:
    """(row, target) of a batch, places counted from the first token that has logits."""
    for row, segment in enumerate(batch):
        for place, pair, token in segment.targets:
            yield row, Target(place - skipped, pair, token)


class _Tally:
    """Sums over the tokens of each pair."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._missing = np.array([len(pair.continuation) for pair in pairs], dtype=np.int64)
        self._total = np.zeros(len(pairs))
        self._greedy = np.ones(len(pairs), dtype=bool)

    def add(self, logits: Tensor, wanted: Iterable[tuple[int, Target]]) -> Iterator[tuple[int, Score]]:
        """Judge targets by logits (B, n, V); the pairs all of whose tokens are known come back."""
        table = np.array([(row, *target) for row, target in wanted], dtype=np.int64).reshape(-1, 4)
        rows, places, pairs, tokens = table.T
        nats, best = _judge(logits, *(torch.from_numpy(part).to(logits.device) for part in (rows, places, tokens)))
        np.add.at(self._total, pairs, nats)
        np.logical_and.at(self._greedy, pairs, best)
        np.subtract.at(self._missing, pairs, 1)
        for pair in np.unique(pairs[self._missing[pairs] == 0]).tolist():
            yield pair, Score(float(self._total[pair]), bool(self._greedy[pair]))


def _judge(logits: Tensor, rows: Tensor, places: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (n,) float64 of tokens by logits (B, L, V) at (row, place), and whether each is the argmax."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = wide[rows, places, tokens]
    nats = chosen.double() - _log_normaliser(wide)[rows, places].double()
    # A maximum is cheap, an argmax is not: only where the token's logit is the largest can it be the first such.
    best = chosen == wide.amax(-1)[rows, places]
    best[best.clone()] = wide[rows[best], places[best]].argmax(-1) == tokens[best]
    return nats.cpu().numpy(), best.cpu().numpy()


def _log_normaliser(logits: Tensor) -> Tensor:
    """Log of the sum of exponentials (B, L) of logits (B, L, V).

    On a CPU block by block, each small enough for its cache: five times as fast as one pass after another over all.
    """
    flat = logits.flatten(0, 1)
    rows = max(1, CACHED // flat.shape[1]) if flat.device.type == "cpu" else max(1, len(flat))
    parts = [block[:, 0] - block.log_softmax(-1)[:, 0] for block in flat.split(rows)]
    return torch.cat(parts).view(logits.shape[:2])


def rows_of(states: Sequence[LayerState], index: Tensor) -> list[LayerState]:
    """The states of some sequences of a batch, in the order of ``index``, with repeats where it has them."""
    return [LayerState(state.conv[index], state.ssm[index]) for state in states]


def _joined(batches: Sequence[list[LayerState]]) -> list[LayerState]:
    """The states of several batches as those of one."""
    return [
        LayerState(torch.cat([state.conv for state in layer]), torch.cat([state.ssm for state in layer]))
        for layer in zip(*batches, strict=True)
    ]


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _padded(sequences: Sequence[np.ndarray]) -> Tensor:
    """(B, L) int64, shorter sequences filled with token 0 on the right."""
    table = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(table)
