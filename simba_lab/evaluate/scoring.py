"""Log-likelihood of continuations after contexts: contexts pruned at their last token, continuations dense.

Works on token ids. Contexts of equal length run together, so that none is ever padded; each is prefilled once for all
its continuations. Continuations are padded on the right, where nothing that is scored can see it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, LayerState

POSITIONS = 1024
"""Continuation positions (sequences x tokens) whose logits are held at once."""
ROWS_PER_CONTEXT = 8
"""Continuations are short: so many times more of them than contexts run together."""
_NOT_SCORED = -100

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pair:
    """A context and what is scored after it: two non-empty int64 arrays of token ids."""

    context: np.ndarray
    continuation: np.ndarray

    def shortened(self, max_length: int) -> Pair:
        """The pair whose context lost its oldest tokens, so that at most ``max_length`` tokens are fed.

        The last token of the continuation is predicted, never fed. Raises InputError if the continuation alone is
        longer than that.
        """
        room = max_length - len(self.continuation) + 1
        if room < 1:
            raise InputError(
                f"max_length: a continuation of {len(self.continuation)} tokens and one token of context do not fit "
                f"into {max_length}; raise max_length"
            )
        return Pair(self.context[-room:], self.continuation)


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation in nats, and whether greedy decoding would have produced it."""

    log_likelihood: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Token ids by the harness's contract.

    Spaces that end the context move to the continuation; both are encoded as one text, which is split where the
    context's own encoding ends; an empty context is the end-of-text token. Raises InputError, naming the text, for a
    continuation that tokenises to nothing.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    head = tokenizer.encode(stripped)
    tail = whole[len(head) :]
    if not tail:
        raise InputError(
            f"continuation {continuation!r} after the context ending in {context[-40:]!r} tokenises to nothing; "
            "there is no token to score"
        )
    return Pair(_ids(head or [tokenizer.eot_id]), _ids(tail))


def rolling_pairs(tokens: Sequence[int], eot_id: int, max_length: int, n_suffix: int, dense: bool) -> list[Pair]:
    """Pairs that score every token of a document exactly once.

    The document follows the end-of-text token. It is cut into blocks of ``n_suffix`` tokens; the context of a block is
    all that precedes it, at most ``max_length - n_suffix`` tokens. A dense model scores the blocks whose context
    is not cut in one pass (``dense``), which gives the same numbers for less work.
    """
    stream = _ids([eot_id, *tokens])
    reach = max_length - n_suffix
    pairs, start = [], 1
    while start < len(stream):
        first = max(0, start - reach)
        length = n_suffix
        if dense and start == 1:
            # Blocks start at 1, 1 + n_suffix, ...: the last one to see the whole past starts at or before `reach`.
            length = ((reach - 1) // n_suffix + 1) * n_suffix
        pairs.append(Pair(stream[first:start], stream[start : start + length]))
        start += length
    return pairs


@torch.no_grad()
def score_pairs(model: LanguageModel, pairs: Sequence[Pair], batch_size: int) -> Iterator[tuple[int, Score]]:
    """(index, score) of every pair, longest contexts first, ``batch_size`` contexts at a time.

    Logits are taken over the whole (padded) vocabulary of the model, as in training.
    """
    for contexts in context_batches([pair.context for pair in pairs], batch_size):
        tokens = np.stack([pairs[owners[0]].context for owners in contexts])
        out = model.prefill(torch.from_numpy(tokens).to(model.device))
        rows = [(row, owner) for row, owners in enumerate(contexts) for owner in owners]
        rows.sort(key=lambda item: len(pairs[item[1]].continuation))
        for chunk in chunks(rows, ROWS_PER_CONTEXT * batch_size):
            index = torch.tensor([row for row, _ in chunk], device=model.device)
            continuations = [pairs[owner].continuation for _, owner in chunk]
            scores = _score(model, out.logits[index], rows_of(out.states, index), continuations)
            yield from ((owner, score) for (_, owner), score in zip(chunk, scores, strict=True))


def context_batches(contexts: Sequence[np.ndarray], batch_size: int) -> Iterator[list[list[int]]]:
    """Batches of up to ``batch_size`` different contexts of one length; each context is the list of its owners."""
    by_length: dict[int, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for owner, context in enumerate(contexts):
        by_length[len(context)][hashlib.sha256(context.tobytes()).digest()].append(owner)
    for length in sorted(by_length, reverse=True):
        yield from chunks(list(by_length[length].values()), batch_size)


def rows_of(states: Sequence[LayerState], index: Tensor) -> list[LayerState]:
    """The states of some sequences of a batch, in the order of ``index``, with repeats where it has them."""
    return [LayerState(state.conv[index], state.ssm[index]) for state in states]


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _score(
    model: LanguageModel, boundary: Tensor, states: list[LayerState], continuations: list[np.ndarray]
) -> list[Score]:
    """Scores of continuations (B of them) after ``boundary`` logits (B, 1, V) and ``states``."""
    targets = _padded(continuations, _NOT_SCORED).to(boundary.device)
    total, greedy = _judge(boundary, targets[:, :1])
    piece = max(1, POSITIONS // len(continuations))
    for start in range(0, targets.shape[1] - 1, piece):
        fed = targets[:, :-1][:, start : start + piece].clamp(min=0)
        logits, states = model.extend(fed, states)
        more, still = _judge(logits, targets[:, 1:][:, start : start + piece])
        total, greedy = total + more, greedy & still
    return [Score(float(nats), bool(exact)) for nats, exact in zip(total.tolist(), greedy.tolist(), strict=True)]


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood (B,) float64 of ``targets`` (B, n) under ``logits`` (B, n, V), and whether all are the argmax."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = F.cross_entropy(wide, targets.flatten(), ignore_index=_NOT_SCORED, reduction="none")
    exact = (logits.argmax(-1) == targets) | (targets == _NOT_SCORED)
    return -loss.view(targets.shape).double().sum(1), exact.all(1)


def _padded(sequences: Sequence[np.ndarray], fill: int) -> Tensor:
    width = max(len(sequence) for sequence in sequences)
    table = np.full((len(sequences), width), fill, dtype=np.int64)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(table)


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int64)
