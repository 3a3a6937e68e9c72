"""Lossless byte-level tokenizers: a BPE trained on the training text, or the bytes themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from simba_lab.errors import InputError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Text to token ids and back, over an alphabet of the 256 bytes, in the `tokenizers` library's json format.

    Ids of one's own tokenizers: 0 is `<|endoftext|>`, which only the data room writes: where a text contains those
    very characters they are encoded as ordinary text.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        if inner.token_to_id(END_OF_TEXT) is None:
            raise InputError(f"data.tokenizer: the tokenizer has no {END_OF_TEXT} token")
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        """Number of token ids; a BPE trained on little text may have fewer than asked for."""
        return self._inner.get_vocab_size()

    @property
    def eot_id(self) -> int:
        """Id of `<|endoftext|>`, which closes every document."""
        return self._inner.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; `decode` gives the very same text back. No special token is added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts on all cores."""
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; a character cut in two by a window's edge appears as U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides how texts are encoded."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: UTF-8 bytes of text that each id stands for; 0 for special tokens.

        Raises:
            InputError: The vocabulary is not over bytes, so that a token's length is not known.
        """
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        added = self._inner.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._inner.get_vocab(with_added_tokens=True).items():
            if index >= len(sizes):
                raise InputError(f"data.tokenizer: token {token!r} has id {index}; ids must run from 0 without a gap")
            if index in added:
                sizes[index] = 0 if added[index].special else len(token.encode())
            elif alphabet.issuperset(token):
                sizes[index] = len(token)
            else:
                raise InputError(f"data.tokenizer: token {token!r} is not byte-level; give a byte-level tokenizer file")
        return sizes

    def spellings(self, ids: Iterable[int]) -> list[bytes]:
        """Bytes of text that each of `ids` stands for, which may be part of a character; a special token's own name."""
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._inner.get_added_tokens_decoder()
        tokens = ((index, self._inner.id_to_token(index)) for index in map(int, ids))
        return [text.encode() if index in added else bytes(byte_of[c] for c in text) for index, text in tokens]

    def save(self, path: str | Path) -> None:
        """Writes one json that the `tokenizers` library, and `load`, can read."""
        self._inner.save(str(path))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a `tokenizers` json.

        Raises:
            InputError: The file is missing, not such a json, not byte-level, or has no `<|endoftext|>`.
        """
        if not Path(path).is_file():
            raise InputError(f"data.tokenizer: no file {path}; give 'bpe', 'bytes' or the path of a tokenizer json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        # The library raises a bare Exception for every kind of bad file.
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"data.tokenizer: {path} is not a tokenizer json ({reason})") from None
        tokenizer = cls(inner)
        tokenizer.token_bytes()
        return tokenizer


def bytes_tokenizer() -> Tokenizer:
    """The tokenizer without training: `<|endoftext|>` is 0, byte b is b + 1."""
    vocabulary = {END_OF_TEXT: 0} | {character: byte + 1 for byte, character in enumerate(_byte_characters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    return Tokenizer(_byte_level(inner))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` ids (at least 257), the same for the same texts.

    Raises:
        InputError: vocab_size < 257, the end-of-text token and the bytes.
    """
    if vocab_size < 257:
        raise InputError(f"data.vocab_size: {vocab_size} must be at least 257 (256 bytes and {END_OF_TEXT})")
    inner = _byte_level(tokenizers.Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner)


def _byte_level(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return inner


def _byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte 0..255.

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
