"""Text after a context: the context is pruned once, then tokens are decoded from cached states."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.likelihood import chunks, rows_of
from simba_lab.model import CapturedDecoder, LanguageModel, LayerState, Output

DEFAULT_TOKENS = 256
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OPTIONS = ("until", *LENGTH_NAMES, "do_sample", "temperature", "top_p", "top_k", "seed")
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What bytes that form no whole character are decoded to."""


@dataclass(frozen=True)
class Decoding:
    """How to go on from a context: greedily at ``temperature`` 0, else by sampling.

    ``top_k`` 0 keeps every token; ``top_p`` keeps the fewest most likely tokens that reach this probability.
    """

    until: tuple[str, ...] = ()
    max_tokens: int = DEFAULT_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Decoding:
        """From the harness's generation options. Without ``do_sample`` a temperature above 0 means sampling.

        Raises InputError for an unknown option or a value out of range.
        """
        for key in options:
            if key not in OPTIONS:
                raise InputError(f"generation option {key!r} is unknown; use {', '.join(OPTIONS)}")
        given = {key: value for key, value in options.items() if value is not None}
        until = given.get("until", ())
        length = next((given[name] for name in LENGTH_NAMES if name in given), DEFAULT_TOKENS)
        temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0.0)
        try:
            made = cls(
                until=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
                max_tokens=int(length),
                temperature=0.0 if given.get("do_sample") is False else float(temperature),
                top_p=float(given.get("top_p", 1.0)),
                top_k=int(given.get("top_k", 0)),
                seed=int(given.get("seed", 0)),
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"generation options {given}: {error}") from None
        made._check()
        return made

    def _check(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"generation option max_gen_toks must be at least 1, got {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"generation options: temperature and top_k must be at least 0 and top_p in (0, 1], "
                f"got {self.temperature}, {self.top_k}, {self.top_p}"
            )


@dataclass(frozen=True, eq=False)
class Prompt:
    """A context (non-empty int64 ids), how to go on, and which repetition of the same request it is."""

    context: np.ndarray
    decoding: Decoding
    repetition: int = 0

    def generator(self) -> torch.Generator:
        """Keyed by the request itself: it draws the same numbers in any batch, order or run."""
        key = json.dumps([self.context.tolist(), self.decoding.seed, self.repetition]).encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))


def read_prompts(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, Mapping[str, Any]]], max_length: int
) -> tuple[list[Prompt], int]:
    """Prompts of (context, options), and how many lost their oldest tokens to make room within ``max_length``.

    An empty context is the end-of-text token. Raises InputError for wrong options and for a text to be written that
    leaves no room.
    """
    prompts, seen, cut = [], Counter(), 0
    for context, options in texts:
        decoding = Decoding.from_options(options)
        room = max_length - decoding.max_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks {decoding.max_tokens} leaves no context within max_length {max_length}; raise max_length"
            )
        ids = tokenizer.encode(context) or [tokenizer.eot_id]
        prompts.append(Prompt(np.array(ids[-room:], dtype=np.int64), decoding, seen[context, decoding]))
        seen[context, decoding] += 1
        cut += len(ids) > room
    return prompts, cut


@torch.no_grad()
def generate(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], batch_size: int
) -> Iterator[tuple[int, str]]:
    """(index, text) of every prompt; the text ends before the first stop string or the end-of-text token.

    Only ids that the tokenizer knows are ever chosen, not the rows that pad the model's vocabulary.
    """
    for contexts in context_batches([prompt.context for prompt in prompts], batch_size):
        tokens = np.stack([prompts[owners[0]].context for owners in contexts])
        out = model.prefill(torch.from_numpy(tokens).to(model.device))
        for chunk in chunks([(row, owner) for row, owners in enumerate(contexts) for owner in owners], batch_size):
            index = torch.tensor([row for row, _ in chunk], device=model.device)
            writers = [_Writer(owner, prompts[owner], tokenizer) for _, owner in chunk]
            _decode(model, writers, out.logits[index, -1], rows_of(out.states, index))
            yield from ((writer.owner, writer.text) for writer in writers)


def context_batches(contexts: Sequence[np.ndarray], batch_size: int) -> Iterator[Sequence[list[int]]]:
    """Batches of up to ``batch_size`` different contexts of one length; each context is the list of its owners."""
    by_length: dict[int, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for owner, context in enumerate(contexts):
        by_length[len(context)][context.tobytes()].append(owner)
    for length in sorted(by_length, reverse=True):
        yield from chunks(list(by_length[length].values()), batch_size)


def _decode(model: LanguageModel, writers: list[_Writer], logits: Tensor, states: list[LayerState]) -> None:
    """Let every writer go on from its row of ``logits`` (B, V) and ``states`` until all have finished."""
    while True:
        tokens = [writer.choose(row) for writer, row in zip(writers, logits, strict=True)]
        going = [row for row, (writer, token) in enumerate(zip(writers, tokens, strict=True)) if writer.accept(token)]
        if not going:
            return
        writers = [writers[row] for row in going]
        fed = torch.tensor([[tokens[row]] for row in going], device=logits.device)
        stepped, states = model.extend(fed, rows_of(states, torch.tensor(going, device=logits.device)))
        logits = stepped[:, -1]


class _Writer:
    """One sequence being written."""

    def __init__(self, owner: int, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.owner, self.text = owner, ""
        self._decoding, self._tokenizer = prompt.decoding, tokenizer
        self._generator = prompt.generator()
        self._tokens: list[int] = []

    def choose(self, logits: Tensor) -> int:
        """The next token from logits (V,)."""
        return choose(logits[: self._tokenizer.vocab_size], self._decoding, self._generator)

    def accept(self, token: int) -> bool:
        """Append a token; False when the text has come to its end."""
        if token == self._tokenizer.eot_id:
            return False
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens)
        ends = [place for stop in self._decoding.until if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        return not ends and len(self._tokens) < self._decoding.max_tokens


@torch.no_grad()
def continuation(
    model: LanguageModel, prefilled: Output, decoding: Decoding, tokenizer: Tokenizer, generator: torch.Generator
) -> Iterator[int]:
    """Token ids after a prefilled context (one sequence), each as soon as it is chosen.

    Ends before the end-of-text token or after ``decoding.max_tokens``; ``decoding.until``, which is about text, is the
    caller's business. Only ids that the tokenizer knows are chosen. On a CUDA device steps are replayed as graphs.
    """
    feed, logits = _feeder(model, prefilled.states), prefilled.logits
    for place in range(decoding.max_tokens):
        token = choose(logits[0, -1, : tokenizer.vocab_size], decoding, generator)
        if token == tokenizer.eot_id:
            return
        yield token
        if place + 1 < decoding.max_tokens:
            logits = feed(torch.tensor([[token]], device=logits.device))


def _feeder(model: LanguageModel, states: list[LayerState]) -> Callable[[Tensor], Tensor]:
    """What feeds one token (1, 1) after another to ``states`` and gives the logits (1, 1, V) of the next."""
    if model.device.type == "cuda":
        decoder = CapturedDecoder(model, batch=1)
        decoder.start(states, torch.zeros(1, 1, dtype=torch.int64, device=model.device))
        return decoder.step

    def feed(token: Tensor) -> Tensor:
        nonlocal states
        logits, states = model.extend(token, states)
        return logits

    return feed


class TextStream:
    """Text of token ids that come one by one, in pieces that never cut a character in two.

    The pieces joined are what the tokenizer decodes from all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._waiting = tokenizer, []

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while bytes of a character are missing."""
        self._waiting.append(token)
        text = self._tokenizer.decode(self._waiting)
        return "" if text.endswith(INCOMPLETE) else self.finish()

    def finish(self) -> str:
        """What is left, an unfinished character as U+FFFD."""
        text = self._tokenizer.decode(self._waiting)
        self._waiting = []
        return text


def choose(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """The next token from logits (V,): the most likely one at temperature 0, else drawn with ``generator``."""
    if decoding.temperature == 0:
        return int(logits.argmax())
    return sample(logits.double().cpu(), decoding, generator)


def sample(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    """A token id drawn from logits (V,) float64 by temperature, then top_k, then top_p."""
    chance, order = torch.softmax(logits / decoding.temperature, 0).sort(descending=True, stable=True)
    if decoding.top_k:
        chance[decoding.top_k :] = 0
    chance = chance / chance.sum()
    chance[chance.cumsum(0) - chance >= decoding.top_p] = 0
    chosen = torch.multinomial(chance, 1, generator=generator)
    return int(order[chosen])
