"""Requests in lines of the width that a model was trained on; only white space changes.

Benchmarks have every paragraph in one line. A model of books, whose lines break at some 70 characters, reads such a
line badly. Here its context is broken as the books are. What is scored stays as published, but for the white space
that it begins with: where its first word would leave the line, a break stands for the space, and is scored in its
place. A model that sees wrapped text expects the break there, and would take a space for a line that has room; and as
it must predict the break itself, the place of the break tells it nothing about the word that it has not said.
"""

from __future__ import annotations

from simba_lab.data.package_text import wrap_line


def wrap_request(context: str, continuation: str, width: int) -> tuple[str, str]:
    """(context, continuation) with the same words, the context in lines of at most ``width`` characters.

    Breaks that are there stay. The context's lines do not depend on the continuation, so that choices share their
    context. No break falls inside the continuation, nor between the two where there is no white space.
    """
    body = context.rstrip()
    end = context[len(body) :]
    body = "\n".join(wrap_line(line, width) for line in body.split("\n"))
    rest = continuation.lstrip()
    start = continuation[: len(continuation) - len(rest)]
    gap, words = end + start, rest.split(maxsplit=1)
    column = len(body) - body.rfind("\n") - 1
    if body and words and gap and "\n" not in gap and column + len(gap) + len(words[0]) > width:
        end, start = ("", "\n") if start else ("\n", "")
    return body + end, start + rest
