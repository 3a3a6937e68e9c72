"""Running text in which facts are stated and asked for, and nothing but the answers is scored.

Facts woven into the text of a language model are too rare a reason to learn to recall them. Here a third of what is
scored are answers, in short windows and many small steps, and finished weights learn within minutes what they had not
learned in 200 million tokens (experiments/LOG.md).
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from simba_lab.data.associations import NOT_SCORED
from simba_lab.data.checks import require_at_least, require_between, require_set
from simba_lab.data.recall import STREAMS
from simba_lab.data.recall_text import ANSWERS, FORMS, KEYS_OF, Fact, make_fact
from simba_lab.data.recall_windows import encode_facts
from simba_lab.data.text import TextData
from simba_lab.data.tokenizer import Tokenizer
from simba_lab.data.windows import TrainingWindows
from simba_lab.errors import InputError

_Event = tuple[list[int], ...]
"""Tokens of a statement, of a question, its answer and the end of its sentence."""
_LONGEST_LIST = 8
_SHORTEST_WINDOW = 64


class DrillData(TextData):
    """Text as `TextData` gives it, with facts to recall in the windows of training and validation.

    A drilled window states facts between its text (one sentence, or a list of up to eight pairs) and asks for each
    again, log-uniformly far behind; labels are -100 but for the answers. All windows of validation are drilled, so that
    its accuracy is that of recall; those of the test are plain text and tell what is left of the language model.

    Args:
        facts: Sentences and lists planted in a window, at most: as many as it holds.
        text_share: Share of the windows of training that stay plain text, all of it scored.
        **text: What `TextData` takes; `length` is at least 64.

    Raises:
        InputError: A value out of range, named `data.KEY`; a tokenizer that joins an answer with what stands beside it.
    """

    def __init__(self, facts: int = 2, text_share: float = 0.05, **text: Any) -> None:
        super().__init__(**text)
        require_set(facts=facts, text_share=text_share)
        require_at_least(1, facts=facts)
        require_between(0, 1, text_share=text_share)
        require_at_least(_SHORTEST_WINDOW, length=self.length)
        self.facts, self.text_share = facts, text_share

    def dataset(self, split: str) -> Dataset:
        """All windows of a split, drilled but for `test`."""
        plain = super().dataset(split)
        if split == "test":
            return plain
        text_share = self.text_share if split == "train" else 0.0
        return DrillWindows(plain, self.tokenizer, self.facts, text_share, (self.seed, STREAMS[split]))


class DrillWindows(Dataset):
    """Windows with facts to recall; item i is a function of the text and of (seed, i) alone.

    Items are {"tokens": (length,) int64, "labels": (length,) int64}; facts and questions take the place of the text at
    the end of a window.
    """

    def __init__(
        self, plain: TrainingWindows, tokenizer: Tokenizer, facts: int, text_share: float, seed: tuple[int, ...]
    ) -> None:
        self._plain, self._tokenizer, self._facts = plain, tokenizer, facts
        self._text_share, self._seed = text_share, seed

    def __len__(self) -> int:
        return len(self._plain)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self._plain[index]
        generator = np.random.default_rng([*self._seed, range(len(self))[index]])
        if generator.random() < self._text_share:
            return item
        text = np.append(item["tokens"].numpy(), item["labels"][-1])
        stream, asked = self._drilled(text, generator)
        labels = np.where(asked, stream, NOT_SCORED)[1:]
        return {"tokens": torch.from_numpy(stream[:-1]), "labels": torch.from_numpy(labels)}

    def _drilled(self, text: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """As many tokens as ``text`` has, and which of them are answers."""
        events = self._events(len(text), generator)
        room = len(text) - sum(len(part) for event in events for part in event)
        pieces = []
        for statement, question, answer, end in events:
            back = int(np.exp(generator.uniform(0, np.log(room + 1)))) - 1
            late = int(generator.integers(back, room + 1))
            pieces += [(late - back, statement, 0, 0), (late, [*question, *answer, *end], len(question), len(answer))]
        stream, asked, done = [], np.zeros(len(text), bool), 0
        # Of pieces at one place the earlier planted comes first: a statement stands before its question.
        for place, tokens, before, count in sorted(pieces, key=lambda piece: piece[0]):
            stream += [*text[done:place], *tokens[:before]]
            asked[len(stream) : len(stream) + count] = True
            stream += tokens[before:]
            done = place
        return np.array([*stream, *text[done:room]], dtype=np.int64), asked

    def _events(self, room: int, generator: np.random.Generator) -> list[_Event]:
        """As many facts as ``room`` tokens hold, at most those asked for; no key comes twice."""
        keys = {form: iter(generator.permutation(KEYS_OF[form]).tolist()) for form in FORMS}
        events: list[_Event] = []
        for _ in range(self._facts):
            form = FORMS[generator.integers(len(FORMS))]
            size = 1 if form == "sentence" else int(generator.integers(1, _LONGEST_LIST + 1))
            words = generator.choice(ANSWERS, size=size).tolist()
            facts = [make_fact(key, word, form) for key, word in zip(islice(keys[form], size), words, strict=False)]
            event = self._largest(facts, room, generator)
            if event is None:
                break
            room -= sum(map(len, event))
            events.append(event)
        if not events:
            raise InputError("data.length: a window has no room for a fact and its question; raise it")
        return events

    def _largest(self, facts: list[Fact], room: int, generator: np.random.Generator) -> _Event | None:
        """The first of ``facts`` with a question about one of them, as many as ``room`` tokens hold; None if none."""
        for count in range(len(facts), 0, -1):
            event = encode_facts(self._tokenizer, facts[:count], facts[int(generator.integers(count))])
            if sum(map(len, event)) <= room:
                return event
        return None
