"""Somebody else's ``config.json``, read key by key: nothing that changes the mathematics passes unseen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from simba_lab.errors import InputError
from simba_lab.model import ModelConfig

_REQUIRED = object()


class Fields:
    """Values of a JSON object; each may be taken once.

    Args:
        values: the object.
        where: file, for messages.
        prefix: path of the object in the file, with a dot at its end.
    """

    def __init__(self, values: Any, where: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a JSON object")
        self._left, self.where, self.prefix = dict(values), where, prefix

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value; raises InputError for a missing one without a default."""
        if key not in self._left and default is _REQUIRED:
            raise InputError(f"{self.where}: {self.prefix}{key} is required")
        return self._left.pop(key, default)

    def only(self, key: str, *accepted: Any) -> Any:
        """The value, which must be one of ``accepted``, the first being the default."""
        value = self.take(key, accepted[0])
        if value not in accepted:
            self.refuse(key, value, " or ".join(dict.fromkeys(json.dumps(item) for item in accepted)))
        return value

    def refuse(self, key: str, value: Any, right: str) -> None:
        raise InputError(f"{self.where}: {self.prefix}{key} {json.dumps(value)} is not supported; {right} is")

    def section(self, key: str) -> Fields:
        """The object under a key; a missing one is empty."""
        return Fields(self.take(key, None) or {}, self.where, f"{self.prefix}{key}.")

    def ignore(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raises InputError for a key that nobody took."""
        for key, value in self._left.items():
            text = json.dumps(value)
            raise InputError(f"{self.where}: {self.prefix}{key} {text if len(text) < 60 else ''} is not a known key")


def refuse_hybrids(fields: Fields) -> None:
    """Attention layers between the Mamba ones, layer norm: not half-loaded."""
    fields.only("attn_layer_idx", [], None)
    fields.only("attn_cfg", {}, None)
    fields.only("rms_norm", True)


def refuse_step_limit(fields: Fields, key: str) -> None:
    """Step sizes clamped to less than [0, inf); infinity comes as a number, as text, or as an object around it."""
    value = fields.take(key, None)
    if value is None:
        return
    numbers = [item.get("__float__") if isinstance(item, Mapping) else item for item in value]
    try:
        unlimited = [float(number) for number in numbers] == [0.0, math.inf]
    except (TypeError, ValueError):
        unlimited = False
    if not unlimited:
        fields.refuse(key, value, "[0.0, Infinity]")


def step_rank(value: Any, d_model: int) -> Any:
    """``dt_rank`` of ours: None where it is the default for the width."""
    if value in ("auto", None):
        return None
    return None if isinstance(d_model, int) and value == -(-d_model // 16) else value


def build(where: str, make: Callable[[], ModelConfig]) -> ModelConfig:
    """The config, its errors naming the file."""
    try:
        return make()
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None
