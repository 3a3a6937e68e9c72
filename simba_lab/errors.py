"""What a user can cause; everything else that escapes is a bug of ours."""

from __future__ import annotations


class InputError(Exception):
    """A bad key, value or file: one line that names it and says what would be right (exit code 2)."""

    exit_code = 2


class BudgetMismatch(InputError):
    """Arms whose FLOPs cannot be made equal: names each arm, its FLOPs and its distance (exit code 3)."""

    exit_code = 3


class NotFinite(InputError):
    """A loss, score, state or weight that is NaN or infinite: names what, where and when."""


class AlteredRecord(InputError):
    """A record that is not what the program wrote: names the file and what differs."""
