"""The yardstick beside every bits-per-byte number: a general-purpose compressor on the same text."""

from __future__ import annotations

import lzma

from simba_lab.errors import InputError


def xz_bits_per_byte(text: str) -> float:
    """Bits per UTF-8 byte of a text after `xz -9` (which, unlike a trained model, has seen nothing else before).

    Raises:
        InputError: The text is empty.
    """
    data = text.encode()
    if not data:
        raise InputError("data: an empty text has no bits per byte; the split holds no document")
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
