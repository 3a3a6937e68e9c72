"""Texts of the data package as a source: what a machine without a network, but for the package index, can measure on.

It is benchmark material, offered here for evaluation and never trained on by us. The package has every paragraph in one
line; here it is broken at spaces into lines of at most 70 characters, as books in plain text are: a model of such books
reads endless lines badly (the ladder's 7m: 4.7 nats per token on papers as they are here, 7.1 without the line breaks).
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from simba_lab.data.document import Document
from simba_lab.data.package import installed_version, read_documents
from simba_lab.errors import InputError

PREFIX = "package:"
WIDTH = 70


def read_package_text(source: str, key: str) -> Iterator[Document]:
    """The documents of `package:papers`, `package:articles` or `package:lambada`.

    papers: the 260 whole articles on language processing (2015 to 2020, arXiv) of QASPER's yes-no questions: title,
        abstract, then every section's heading and paragraphs. Some 3,000 to 39,000 tokens of a BPE of 8192 ids each, so
        that long windows lie within one text. Formulas are LaTeX, citations read BIBREF7.
    articles: the 48 Wikipedia articles of SQuAD 1.1's development set, as far as 1,000 of its questions show them: the
        distinct paragraphs of one article, joined in the order of the questions, which is not the article's, and with
        gaps. Never paragraphs of two articles.
    lambada: the 5,153 passages of LAMBADA's test set, each a document of its own (236 such tokens at most): pieces of
        novels, any run of white space one space. Which passages share a novel is not known, so none are joined.

    Raises:
        InputError: Another name, or the package is not installed (with the command that installs it).
    """
    name, _ = _wanted(source, key)
    for document in _TEXTS[name]():
        paragraphs = (paragraph for part in document.text.split("\n") if (paragraph := part.strip()))
        yield Document(document.name, "\n\n".join(map(wrap_line, paragraphs)))


def wrap_line(line: str, width: int = WIDTH) -> str:
    """A line without breaks as lines of at most ``width`` characters, broken at spaces; a longer word stays whole."""
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def package_identity(source: str, key: str) -> list[list[str | int]]:
    """What a cache must compare: the version of the package, whose files do not change within one."""
    return [[source, _wanted(source, key)[1]]]


def _wanted(source: str, key: str) -> tuple[str, str]:
    """Name of the text, and the version of the package that is there."""
    name = source.removeprefix(PREFIX)
    if name not in _TEXTS:
        near = difflib.get_close_matches(name, _TEXTS, n=1)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        raise InputError(f"{key}: no text {source}; it is one of {', '.join(PREFIX + text for text in _TEXTS)}{hint}")
    return name, installed_version(f"{key}: {source}")


def _papers() -> Iterator[Document]:
    papers = {question["id"].partition("_")[0]: question for question in read_documents("qasper_yesno/rc_5shot")}
    for number, paper in papers.items():
        yield Document(f"papers:{number}", "\n".join(_paragraphs(paper)))


def _paragraphs(paper: dict[str, Any]) -> Iterator[str]:
    yield from (paper["title"], paper["abstract"])
    sections = paper["full_text"]
    for heading, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        # A heading is written behind those it stands under.
        yield (heading or "").rpartition(":::")[2].strip()
        yield from paragraphs


def _articles() -> Iterator[Document]:
    articles: dict[str, dict[str, None]] = {}
    for question in read_documents("squad/bpb_5shot"):
        shown = question["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0]
        articles.setdefault(question["title"], {})[shown] = None
    for title, paragraphs in articles.items():
        yield Document(f"articles:{title}", "\n".join(paragraphs))


def _lambada() -> Iterator[Document]:
    for passage in read_documents("lambada/bpb_0shot"):
        yield Document(f"lambada:{passage['id']}", f"{passage['query']} {passage['answers_text'][0]}")


_TEXTS: dict[str, Callable[[], Iterator[Document]]] = {
    "papers": _papers, "articles": _articles, "lambada": _lambada,
}  # fmt: skip
