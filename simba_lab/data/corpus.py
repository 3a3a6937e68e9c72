"""From a source to token shards: load, split, tokenize, encode, once for all runs with the same settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console

from simba_lab.data.document import Document
from simba_lab.data.recall_text import weave
from simba_lab.data.shards import Shard, read_shards, write_shard
from simba_lab.data.sources import CACHE_TAG, load_documents, source_identity
from simba_lab.data.split import hash_order, split_documents, without_repeats
from simba_lab.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from simba_lab.errors import InputError

# Part of every cache key: raise it when the same settings would give other shards.
FORMAT = 3
TOKENIZER_TEXT = 25_000_000


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that the tokens depend on; the fields are those of `TextData`."""

    source: str = "stdlib"
    text_field: str = "text"
    validation_source: str | None = None
    test_source: str | None = None
    validation_share: float = 0.08
    test_share: float = 0.20
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    recall_share: float = 0.0
    recall_reach: int = 8000

    @property
    def sources(self) -> dict[str, str]:
        """Configuration key -> source, for those that are set."""
        named = {
            "data.source": self.source,
            "data.validation_source": self.validation_source,
            "data.test_source": self.test_source,
        }
        return {key: source for key, source in named.items() if source is not None}


@dataclass(frozen=True)
class Corpus:
    """A tokenizer, the shards by split name, and the folder they live in."""

    tokenizer: Tokenizer
    shards: Mapping[str, Shard]
    folder: Path


def open_corpus(settings: CorpusSettings, cache_dir: str | Path) -> Corpus:
    """The corpus of the settings, built first if `cache_dir` does not hold it.

    The folder is named by a hash of the settings, of every source file's path, size and modification time, of a
    tokenizer file's content and of the library versions that matter. It appears complete or not at all: it is
    written beside its place and renamed, so an interrupted or a second, simultaneous build does no harm.

    Raises:
        InputError: From the sources, the tokenizer, or when no training text is left.
    """
    folder = Path(cache_dir) / cache_key(settings)
    if not folder.is_dir():
        _build_beside(settings, folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Corpus(tokenizer, read_shards(folder, tokenizer), folder)


def cache_key(settings: CorpusSettings) -> str:
    """20 hexadecimal digits that change whenever the tokens could."""
    identity = {
        "format": FORMAT,
        "settings": asdict(settings),
        "sources": {key: source_identity(source, key) for key, source in settings.sources.items()},
        "tokenizers": version("tokenizers"),
        "tokenizer": _file_hash(settings.tokenizer),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def split_sources(settings: CorpusSettings) -> dict[str, list[Document]]:
    """The documents of each split. A split with a source of its own takes nothing from `source`."""
    shares = {
        "validation_share": 0.0 if settings.validation_source is not None else settings.validation_share,
        "test_share": 0.0 if settings.test_source is not None else settings.test_share,
    }
    documents = load_documents(settings.source, settings.text_field, "data.source")
    splits = split_documents(documents, **shares)
    for split, source in (("validation", settings.validation_source), ("test", settings.test_source)):
        if source is not None:
            splits[split] = load_documents(source, settings.text_field, f"data.{split}_source")
    splits = without_repeats(splits)
    if not splits["train"]:
        raise InputError("data.source: no training text is left beside validation and test; give more or other text")
    return splits


def _build_beside(settings: CorpusSettings, folder: Path) -> None:
    console = Console(stderr=True)
    with console.status(f"reading {settings.source}"):
        splits = split_sources(settings)
    with console.status("training the tokenizer"):
        tokenizer = _make_tokenizer(settings, splits["train"])
    if settings.recall_share:
        with console.status("weaving recall material into the training text"):
            splits["train"] = [_woven(document, settings) for document in splits["train"]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / CACHE_TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n")
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save(draft / "tokenizer.json")
        for split, documents in splits.items():
            write_shard(draft, split, documents, tokenizer)
        (draft / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
        _rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, folder: Path) -> None:
    # mkdtemp makes a folder for its owner alone; the cache follows the folder it lies in.
    draft.chmod(folder.parent.stat().st_mode)
    try:
        os.rename(draft, folder)
    except OSError:
        # Another process with the same settings was faster; its shards are the same.
        if not folder.is_dir():
            raise


def _make_tokenizer(settings: CorpusSettings, documents: Sequence[Document]) -> Tokenizer:
    if settings.tokenizer == "bytes":
        return bytes_tokenizer()
    if settings.tokenizer == "bpe":
        return train_bpe(_tokenizer_texts(documents), settings.vocab_size)
    return Tokenizer.load(settings.tokenizer)


def _woven(document: Document, settings: CorpusSettings) -> Document:
    """Recall material in one document, decided by its name, so that no other document changes it."""
    key = hashlib.sha256(document.name.encode()).digest()
    generator = np.random.default_rng(int.from_bytes(key))
    return Document(document.name, weave(document.text, settings.recall_share, settings.recall_reach, generator))


def _tokenizer_texts(documents: Sequence[Document]) -> Iterator[str]:
    """Training texts, mixed by hash order, up to 25 million characters: more changes a vocabulary little."""
    left = TOKENIZER_TEXT
    for document in hash_order(documents):
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _file_hash(tokenizer: str) -> str | None:
    """SHA-256 of a tokenizer file, None for the built-in kinds."""
    if tokenizer in ("bpe", "bytes"):
        return None
    if not Path(tokenizer).is_file():
        raise InputError(f"data.tokenizer: no file {tokenizer}; give 'bpe', 'bytes' or the path of a tokenizer json")
    return hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()
