"""Tokens as readable text: bytes of split characters joined again, and what kind of text each token is."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

KINDS = ("word", "number", "punctuation", "whitespace", "mixed")


def pieces(spellings: Sequence[bytes]) -> list[tuple[int, str]]:
    """(number of tokens, text) of the shortest runs of tokens that each hold whole UTF-8 characters.

    A character that tokens share belongs to one run; bytes that form no character read U+FFFD. Every token is in
    exactly one run and the texts joined are the whole.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, tokens, text = [], 0, ""
    for place, spelling in enumerate(spellings):
        text += decoder.decode(spelling, final=place == len(spellings) - 1)
        tokens += 1
        if not decoder.getstate()[0]:
            found.append((tokens, text))
            tokens, text = 0, ""
    return found


def kind_of(text: str) -> str:
    """What kind of text a run is: one of ``KINDS``; white space around other text does not count.

    ``word`` is letters, digits and underscores with a letter or underscore among them, ``number`` digits only,
    ``punctuation`` no letter and no digit, ``mixed`` the rest.
    """
    core = text.strip()
    if not core:
        return "whitespace"
    if all(character.isalnum() or character == "_" for character in core):
        return "number" if core.isdecimal() else "word"
    return "mixed" if any(character.isalnum() for character in core) else "punctuation"


def kinds_by_token(runs: Iterable[tuple[int, str]]) -> list[str]:
    """The kind of every token, that of its run."""
    return [kind for tokens, text in runs for kind in [kind_of(text)] * tokens]
