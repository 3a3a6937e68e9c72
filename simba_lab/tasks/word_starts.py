"""Places in token sequences where text can be cut: at white space, so that the parts tokenise as the whole does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simba_lab.data import Tokenizer

# A word of more tokens than this is no word.
_FARTHEST = 32


def next_word_start(tokens: Sequence[int], position: int, tokenizer: Tokenizer) -> int | None:
    """The first place from ``position`` on whose token begins with white space, None if it is far away.

    The beginning of the sequence counts as a word's start when ``position`` is 0: there is nothing to cut.
    """
    if position == 0:
        return 0
    return _first(range(position, min(position + _FARTHEST, len(tokens))), tokens, tokenizer)


def last_word_start(tokens: Sequence[int], position: int, tokenizer: Tokenizer) -> int | None:
    """The last place up to ``position`` whose token begins with white space, None if it is far away."""
    return _first(range(position, max(position - _FARTHEST, 0), -1), tokens, tokenizer)


def _first(places: Iterable[int], tokens: Sequence[int], tokenizer: Tokenizer) -> int | None:
    return next((place for place in places if tokenizer.decode(tokens[place : place + 1])[:1].isspace()), None)


def survives(text: str, tokens: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Does ``text`` tokenise to exactly ``tokens``? Not if a character or a word was cut in two."""
    return tokenizer.encode(text) == list(tokens)
