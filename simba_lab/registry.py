"""Name -> class tables for the parts a user may replace: criteria and keep schedules.

A *spec* names one object in plain data, so that it can stand in YAML, in a checkpoint and in a results file:
a registry name (``"linear"``), a dotted class path (``"my_file.MyCriterion"``), or
``{"class_path": <either>, "init_args": {...}}``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from simba_lab.errors import InputError

T = TypeVar("T")
Spec = str | Mapping[str, Any]


class Registry(Generic[T]):
    """Table of the built-in classes of one kind.

    Classes follow one rule that makes them serialisable: every ``__init__`` argument is plain data and is kept under
    an attribute of the same name.
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ValueError for a name that is taken."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted(self._classes)

    def name_of(self, obj: T | type[T]) -> str:
        """Registry name of a built-in, dotted class path of anything else."""
        cls = obj if isinstance(obj, type) else type(obj)
        for name, known in self._classes.items():
            if known is cls:
                return name
        return f"{cls.__module__}.{cls.__qualname__}"

    def resolve(self, name: str) -> type[T]:
        """Class behind a registry name or a dotted path. Raises InputError that lists what there is."""
        if name in self._classes:
            return self._classes[name]
        if "." not in name:
            near = difflib.get_close_matches(name, self._classes, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(
                f"{self.kind}: {name!r} is unknown{hint}; use one of {', '.join(self.names())}, or a class path"
            )
        module, _, attribute = name.rpartition(".")
        if not all(name.split(".")):
            raise InputError(f"{self.kind}: {name!r} is no class path; one looks like my_file.MyClass")
        try:
            cls = getattr(importlib.import_module(module), attribute, None)
        except Exception as error:  # whatever the user's module does when it is imported
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{self.kind}: cannot import {module!r} of class path {name!r}: {reason}") from error
        if cls is None:
            raise InputError(f"{self.kind}: module {module!r} has no class {attribute!r}")
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise InputError(f"{self.kind}: {name!r} is not a subclass of {self.base.__module__}.{self.base.__name__}")
        return cls

    def build(self, spec: Spec | T) -> T:
        """Object described by ``spec``; an object of the kind is returned as it is."""
        if isinstance(spec, self.base):
            return spec
        class_path, init_args = self.parse(spec)
        return self.construct(self.resolve(class_path), init_args)

    def parse(self, spec: Spec) -> tuple[str, dict[str, Any]]:
        """(class path, init args) of a spec, checked for form only."""
        if isinstance(spec, str):
            return spec, {}
        if not isinstance(spec, Mapping):
            raise InputError(f"{self.kind}: expected a name or class_path + init_args, got {spec!r}")
        unknown = set(spec) - {"class_path", "init_args"}
        if unknown or "class_path" not in spec:
            raise InputError(
                f"{self.kind}: expected the keys class_path and init_args, got {', '.join(map(str, spec))}"
            )
        class_path, init_args = spec["class_path"], spec.get("init_args") or {}
        if not isinstance(class_path, str) or not isinstance(init_args, Mapping):
            raise InputError(f"{self.kind}: class_path must be a name and init_args a mapping, got {dict(spec)!r}")
        return class_path, dict(init_args)

    def construct(self, cls: type[T], init_args: Mapping[str, Any]) -> T:
        """``cls(**init_args)``, unknown and missing arguments named."""
        known = self.arguments(cls)
        name = self.name_of(cls)
        for key in init_args:
            if key not in known:
                takes = ", ".join(known) or "none"
                raise InputError(f"{self.kind} {name}: unknown option {key!r}; its options: {takes}")
        for key, parameter in known.items():
            if parameter.default is inspect.Parameter.empty and key not in init_args:
                raise InputError(f"{self.kind} {name}: option {key!r} is required")
        try:
            return cls(**init_args)
        except TypeError as error:
            raise InputError(f"{self.kind} {name}: {error}") from None

    @staticmethod
    def arguments(cls: type) -> dict[str, inspect.Parameter]:
        """The ``__init__`` arguments of a class, ``self`` left out."""
        if cls.__init__ is object.__init__:
            return {}
        return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])

    def spec(self, obj: T) -> dict[str, Any]:
        """Plain data from which :meth:`build` makes an equal object.

        Raises InputError for a class that does not keep an argument under its name.
        """
        arguments = self.arguments(type(obj))
        for key in arguments:
            if not hasattr(obj, key):
                raise InputError(f"{self.kind} {self.name_of(obj)}: __init__ must keep its argument as self.{key}")
        return {"class_path": self.name_of(obj), "init_args": {key: getattr(obj, key) for key in arguments}}
