"""What is scored, as token ids: pairs of a context and a continuation, made from texts by the harness's contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from simba_lab.data import Tokenizer
from simba_lab.errors import InputError


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


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """:func:`encode_pairs` of one."""
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def encode_pairs(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Token ids of (context, continuation) texts by the harness's contract.

    Spaces that end the context move to the continuation; both are encoded as one text, which is split where the
    context's own encoding ends; an empty context is the end-of-text token. Raises InputError, naming the text, for a
    continuation that tokenises to nothing.
    """
    heads = list(dict.fromkeys(context.rstrip() for context, _ in texts))
    ids = dict(zip(heads, tokenizer.encode_batch(heads), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in texts])
    return [
        _pair(tokenizer, context, continuation, ids[context.rstrip()], whole)
        for (context, continuation), whole in zip(texts, wholes, strict=True)
    ]


def _pair(tokenizer: Tokenizer, context: str, continuation: str, head: list[int], whole: list[int]) -> Pair:
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


def _ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int64)
