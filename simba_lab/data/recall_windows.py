"""Windows whose suffix begins with the answer to a question that ends the context, planted far back in it.

Running text rarely tells whether a model still has its far past. Here the answer stands once, a chosen number of tokens
before the question: a model that has read less cannot know it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from simba_lab.data.evidence import find_last_occurrence
from simba_lab.data.recall_text import KEYS, NAMES, Fact, draw_facts
from simba_lab.data.tokenizer import Tokenizer
from simba_lab.data.windows import EvalWindows
from simba_lab.errors import InputError

GAP = "\n\n"
PASSAGE, CUE = 64, 16
MOST_FACTS = {"sentence": len(NAMES), "pair": len(KEYS), "passage": 1}


def plant(
    windows: EvalWindows, tokenizer: Tokenizer, distance: int, form: str = "sentence", facts: int = 1, seed: int = 0
) -> EvalWindows:
    """``windows`` with something to recall: same sizes, documents and order.

    A context becomes [its older text][what is planted][``distance`` tokens of its text][question]; its oldest tokens
    make room. The suffix becomes [answer][its text], cut to the same length; only the answer counts.

    Args:
        windows: of plain text.
        tokenizer: the one that made them.
        distance: tokens between what is planted and the question.
        form: ``sentence`` and ``pair`` as `simba_lab.data.recall_text.draw_facts` makes them; ``passage``: 64 tokens of
            the text itself come back, the first 16 as the question, the others as the answer.
        facts: facts planted side by side, one of which is asked for; 1 for a passage, else at most one for each key.
        seed: decides facts and questions, window by window.

    Raises InputError, naming the key, for an unknown form, a number out of range, or windows too short.
    """
    _check(distance, form, facts, seed)
    tokens = windows.tokens.numpy().copy()
    scored = np.zeros((len(tokens), windows.n_suffix), bool)
    for row, (window, document) in enumerate(zip(tokens, windows.document.tolist(), strict=True)):
        generator = np.random.default_rng([seed, document, row])
        context, suffix = window[: windows.n_context], window[windows.n_context :]
        if form == "passage":
            planted, asked, answer, end = _passage(context, distance)
        else:
            planted, asked, answer, end = _fact(tokenizer, generator, form, facts)
        room = len(context) - len(planted) - len(asked) - distance
        if room < 0:
            raise InputError(
                f"recall.distance: {distance} tokens, {len(planted)} planted and {len(asked)} of a question do not fit "
                f"into n_context {len(context)}; lower it{' or recall.facts' * (facts > 1)}, or raise n_context"
            )
        if len(answer) > len(suffix):
            raise InputError(f"n_suffix: {len(suffix)} tokens have no room for an answer of {len(answer)}; raise it")
        text = context[len(planted) + len(asked) :]
        pieces = (text[:room], planted, text[room:], asked, answer, end, suffix)
        window[:] = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])[: len(window)]
        scored[row, : len(answer)] = True
    last = find_last_occurrence(tokens, windows.n_context)
    n_bytes = tokenizer.token_bytes()[tokens[:, windows.n_context :]].sum(axis=1)
    return replace(windows, tokens=torch.from_numpy(tokens), last_occurrence=last, n_bytes=n_bytes, scored=scored)


def _check(distance: int, form: str, facts: int, seed: int) -> None:
    if form not in MOST_FACTS:
        raise InputError(f"recall.form: no {form!r}; it is one of {', '.join(MOST_FACTS)}")
    if not 1 <= facts <= MOST_FACTS[form]:
        raise InputError(f"recall.facts: {facts} of the form {form!r} must lie in 1..{MOST_FACTS[form]}")
    if distance < 0 or seed < 0:
        key, value = ("distance", distance) if distance < 0 else ("seed", seed)
        raise InputError(f"recall.{key}: {value} must be at least 0")


def _fact(tokenizer: Tokenizer, generator: np.random.Generator, form: str, count: int) -> Iterator[list[int]]:
    """Tokens of the facts, of the question about one of them, of its answer and of what ends the sentence."""
    facts = draw_facts(generator, count, form)
    yield from encode_facts(tokenizer, facts, facts[int(generator.integers(count))])


def encode_facts(tokenizer: Tokenizer, facts: Sequence[Fact], chosen: Fact) -> tuple[list[int], ...]:
    """Tokens of a paragraph of ``facts``, of the question about ``chosen``, its answer and the end of its sentence.

    Raises InputError if the tokenizer joins the answer with what stands beside it.
    """
    question = GAP + chosen.question
    asked = tokenizer.encode(question)
    whole = tokenizer.encode(question + chosen.answer)
    ended = tokenizer.encode(question + chosen.answer + chosen.end)
    if whole[: len(asked)] != asked or ended[: len(whole)] != whole:
        raise InputError(f"recall: this tokenizer joins {chosen.answer!r} with what stands beside it; use another form")
    planted = tokenizer.encode(GAP + " ".join(fact.statement for fact in facts) + GAP)
    return planted, asked, whole[len(asked) :], ended[len(whole) :]


def _passage(context: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """The tokens that stand ``distance`` before the end, and again as question and answer; nothing is planted."""
    start = len(context) - distance - PASSAGE
    if start < 0:
        raise InputError(
            f"recall.distance: {distance} and a passage of {PASSAGE} do not fit into {len(context)} tokens"
        )
    passage = context[start : start + PASSAGE]
    yield from (context[:0], passage[:CUE], passage[CUE:], context[:0])
