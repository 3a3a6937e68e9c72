"""Recall in plain words: what is stated, asked and woven in."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from simba_lab.data import ANSWERS, TextData, draw_facts, weave
from simba_lab.data.corpus import CorpusSettings, open_corpus
from simba_lab.errors import InputError

PARAGRAPHS = [
    f"Paragraph {number} tells of {number * number} ships and {number + 7} harbours.\n\n" for number in range(900)
]
TEXT = "".join(PARAGRAPHS)
PAIR = re.compile(r"\[ (\w+) = (\w+)\]")
SECRET = re.compile(r"The secret of (\w+) is (\w+)\.")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("form", ["sentence", "pair"])
def test_facts_differ_in_key_and_end_with_their_answer(form):
    facts = draw_facts(rng(), 40, form)
    assert len({fact.question for fact in facts}) == 40
    for fact in facts:
        assert fact.statement == fact.question + fact.answer + fact.end
        assert fact.answer[0] == " " and fact.answer[1:] in ANSWERS
    assert facts == draw_facts(rng(), 40, form) != draw_facts(rng(1), 40, form)


@pytest.mark.parametrize(
    ("count", "form", "message"), [(0, "pair", "count"), (82, "pair", "1..81"), (1, "riddle", "form")]
)
def test_facts_that_cannot_be_drawn_are_refused(count, form, message):
    with pytest.raises(InputError, match=message):
        draw_facts(rng(), count, form)


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3])
def test_the_share_woven_in_is_the_one_asked_for(share):
    woven = weave(TEXT, share, 4000, rng())
    assert (len(woven) - len(TEXT)) / len(woven) == pytest.approx(share, rel=0.15)
    assert woven == weave(TEXT, share, 4000, rng()) != weave(TEXT, share, 4000, rng(1))


def test_the_text_itself_stays_whole_and_in_order():
    left = iter(weave(TEXT, 0.1, 4000, rng()))
    assert all(character in left for character in TEXT)


@pytest.mark.parametrize("pattern", [PAIR, SECRET])
def test_what_is_stated_comes_back_with_the_same_answer_within_reach(pattern):
    found = list(pattern.finditer(weave(4 * TEXT, 0.05, 3000, rng())))
    assert len(found) > 20 and all(count % 2 == 0 for count in Counter(match.group() for match in found).values())
    places: dict[str, list[int]] = {}
    for match in found:
        places.setdefault(match.group(), []).append(match.start())
    ways = [second - first for first, second in (twice for twice in places.values() if len(twice) == 2)]
    # The way back is measured in the text without what is woven in.
    assert len(ways) > 10 and 50 < min(ways) and 1000 < max(ways) < 3600


def test_passages_come_back_word_for_word():
    woven = weave(TEXT, 0.1, 3000, rng())
    kept = Counter(re.findall(r"Paragraph (\d+) tells", woven))
    assert max(kept.values()) > 1 and set(kept) >= {str(number) for number in range(900)}


def test_nothing_is_woven_into_a_share_of_zero_or_a_single_paragraph():
    assert weave(TEXT, 0.0, 4000, rng()) == TEXT
    assert weave("one paragraph alone", 0.2, 4000, rng()) == "one paragraph alone"


def test_only_training_text_is_woven_into(tmp_path):
    (tmp_path / "books").mkdir()
    for number in range(12):
        text = "".join(PARAGRAPHS[50 * number : 50 * number + 50])
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    source = {"source": str(tmp_path / "books"), "tokenizer": "bytes", "validation_share": 0.2}
    plain, woven = (
        open_corpus(CorpusSettings(**source, recall_share=share, recall_reach=1000), tmp_path / "cache")
        for share in (0.0, 0.2)
    )
    assert plain.folder != woven.folder
    for split in ("validation", "test"):
        assert plain.shards[split].texts(plain.tokenizer) == woven.shards[split].texts(woven.tokenizer)
    before, after = (len("".join(corpus.shards["train"].texts(corpus.tokenizer))) for corpus in (plain, woven))
    assert (after - before) / after == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall_share": 0.7}, "data.recall_share: 0.7 must be at most 0.5"),
        ({"recall_share": -0.1}, "data.recall_share"),
        ({"recall_reach": 10}, "data.recall_reach: 10 must be at least 100"),
        ({"recall_share": None}, "data.recall_share: null"),
    ],
)
def test_bad_shares_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        TextData(**settings)
