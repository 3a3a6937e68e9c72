"""Recall in plain words: facts that a text states once and asks for later, and weaving them into running text.

Ordinary prose hardly ever needs its far past, so models trained on it alone do not learn to look there. Woven material
does: a fact or a list of pairs whose answer stands only further up, or a passage that comes back word for word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

import numpy as np

from simba_lab.errors import InputError

# Common words: most tokenizers keep them whole, and what binds a key to its answer is a convolution over four tokens.
NAMES = tuple(
    "Albert Alexander Andrew Anna Arthur Ben Billy Charles David Dick Edith Edward Elizabeth Felix Francis Frank "
    "Frederick George Gilbert Godfrey Grace Harry Henry Herbert Horace Jack Jacob James Jean Jim Joe John Laura "
    "Louis Maria Martha Martin Mary Michael Nell Oliver Paul Percy Peter Phil Philip Richard Robert Sam Simon "
    "Thomas Tom Ursula William".split()
)
KEYS = tuple(
    "bank bed bell board boat bridge cabin camp cart castle chair church city clock coast coat college corner "
    "cottage court desert desk door farm field fire fleet floor forest fort gate grave hall hill hotel house hut "
    "inn island kitchen lake lamp library market mill mine moor mountain office palace path pier pit plain port "
    "prison river road rock roof room school sea shop shore square stable station stream street table tent "
    "theatre tower town train valley village wall well yard".split()
)
ANSWERS = tuple(
    "beard bird blood book bottle bread brother butter captain child circle cloud crown dance dinner doctor dog "
    "dream dress dust earth engine feather finger fish flag flame flower fox friend fruit garden ghost glass gold "
    "grass heart horse iron judge king knife lawyer leaf leather letter lion master money moon morning mother "
    "music night oil paper picture pipe poem poet powder prince queen rain ring rope sailor sand servant shadow "
    "sheep shield silk silver sister smoke snow soldier song spring star steam steel stone storm straw summer "
    "sword thunder tongue treasure tree vessel water wheel wind window wine winter wood".split()
)
Form = Literal["sentence", "pair"]
FORMS: tuple[Form, ...] = ("sentence", "pair")
KINDS = (*FORMS, "passage")

KEYS_OF: dict[str, tuple[str, ...]] = {"sentence": NAMES, "pair": KEYS}
_PAIRS = 8
_PASSAGE = (60, 400)
# Characters that a statement and its repetition usually take, or a passage.
_USUAL_SIZE = {"sentence": 61, "pair": 279, "passage": 180}
_NEAREST = 100
_TRIES = 20


@dataclass(frozen=True)
class Fact:
    """What is stated, the words that ask for it later, and the one word that answers them.

    ``question + answer + end`` is how the text itself would repeat the fact.
    """

    statement: str
    question: str
    answer: str
    end: str


def draw_facts(generator: np.random.Generator, count: int, form: Form = "sentence") -> list[Fact]:
    """``count`` facts about different keys; the answers are drawn independently from ``ANSWERS``.

    A ``sentence`` names a person ("The secret of Mary is silver."), a ``pair`` a place ("[ bridge = silver]").

    Raises InputError for more facts than there are keys, or an unknown form.
    """
    if form not in FORMS:
        raise InputError(f"form: no '{form}'; it is one of {', '.join(FORMS)}")
    keys = KEYS_OF[form]
    if not 1 <= count <= len(keys):
        raise InputError(f"count: {count} facts of the form '{form}' must lie in 1..{len(keys)}")
    chosen = generator.choice(keys, size=count, replace=False).tolist()
    words = generator.choice(ANSWERS, size=count).tolist()
    return [make_fact(key, word, form) for key, word in zip(chosen, words, strict=True)]


def make_fact(key: str, word: str, form: Form) -> Fact:
    """That ``word`` is the secret of the person, or belongs to the place, ``key``."""
    question, end = (f"The secret of {key} is", ".") if form == "sentence" else (f"[ {key} =", "]")
    return Fact(f"{question} {word}{end}", question, f" {word}", end)


def weave(text: str, share: float, reach: int, generator: np.random.Generator) -> str:
    """``text`` with recall material between its paragraphs.

    A third of what is woven in, by count, are single facts, a third lists of eight pairs, both stated once and
    repeated once; a third are passages of 60 to 400 characters of the text itself that come back. The way back is
    log-uniform between 100 and ``reach`` characters of the text. Keys go round, so that between a fact and its
    repetition hardly another one has the same key.

    Args:
        text: Paragraphs parted by empty lines; a text without them is returned as it is.
        share: Of the characters returned, those woven in; approximately, in [0, 1).
        reach: Characters back at most.
        generator: Decides everything.
    """
    places = np.array([match.end() for match in re.finditer(r"\n\s*\n", text)], dtype=np.int64)
    wanted = share / (1 - share) * len(text)
    events = []
    while wanted > 0 and (spot := _two_places(places, reach, generator)):
        kind = KINDS[generator.integers(len(KINDS))]
        events.append((*spot, kind))
        wanted -= _USUAL_SIZE[kind]
    return "".join(_joined(text, sorted(_pieces(text, sorted(events), generator), key=lambda piece: piece[0])))


def _pieces(
    text: str, events: Sequence[tuple[int, int, str]], generator: np.random.Generator
) -> Iterator[tuple[int, str]]:
    """Paragraphs and the places of the text they go to: a statement and its repetition, or a repeated passage alone."""
    keys = {form: cycle(generator.permutation(KEYS_OF[form]).tolist()) for form in FORMS}
    for early, late, kind in events:
        if kind == "passage":
            length = round(_log_uniform(*_PASSAGE, generator))
            yield late, text[max(0, early - length) : early].strip() + "\n\n"
            continue
        size = _PAIRS if kind == "pair" else 1
        words = generator.choice(ANSWERS, size=size).tolist()
        facts = [make_fact(key, word, kind) for key, word in zip(islice(keys[kind], size), words, strict=True)]
        asked = (facts[index] for index in generator.permutation(size))
        yield early, _paragraph(facts)
        yield late, _paragraph(asked)


def _two_places(places: np.ndarray, reach: int, generator: np.random.Generator) -> tuple[int, int] | None:
    """Two ends of paragraphs at most ``reach`` characters apart; None if twenty tries find none."""
    for _ in range(_TRIES if len(places) > 1 else 0):
        early = int(places[generator.integers(len(places))])
        aim = early + _log_uniform(_NEAREST, reach, generator)
        index = int(np.searchsorted(places, aim))
        if index < len(places) and early < places[index] <= early + reach:
            return early, int(places[index])
    return None


def _log_uniform(low: float, high: float, generator: np.random.Generator) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


def _paragraph(facts: Iterable[Fact]) -> str:
    return " ".join(fact.statement for fact in facts) + "\n\n"


def _joined(text: str, pieces: Sequence[tuple[int, str]]) -> Iterator[str]:
    done = 0
    for place, piece in pieces:
        yield text[done:place]
        yield piece
        done = place
    yield text[done:]
