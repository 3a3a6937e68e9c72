"""Registries: small, loud, and every mistake is one line that says what would be right."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.registry import Registry


class Animal(ABC):
    @abstractmethod
    def sound(self) -> str: ...


ANIMALS: Registry[Animal] = Registry("animal", Animal)


@ANIMALS.register("dog")
class Dog(Animal):
    def __init__(self, times: int = 1) -> None:
        self.times = times

    def sound(self) -> str:
        return "woof " * self.times


@ANIMALS.register("donkey")
class Donkey(Animal):
    def __init__(self, pitch: float, ears: list[int] | None = None) -> None:
        if pitch < 0:
            raise TypeError("pitch is a frequency")
        self.pitch, self.ears = pitch, ears

    def sound(self) -> str:
        return f"ia at {self.pitch}"


@ANIMALS.register("fish")
class Fish(Animal):
    def sound(self) -> str:
        return ""


class Stray(Dog):
    """Importable, not registered."""


class Mute(Animal):
    """Abstract still."""


class Forgetful(Animal):
    def __init__(self, colour: str = "grey") -> None:
        self._colour = colour

    def sound(self) -> str:
        return self._colour


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a module of the user's on the import path, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield lambda name, text: (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def message(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and "animal" in text
    return text


def test_names_are_sorted_and_point_at_their_classes() -> None:
    assert ANIMALS.names() == ["dog", "donkey", "fish"]
    assert [ANIMALS.resolve(name) for name in ANIMALS.names()] == [Dog, Donkey, Fish]
    assert ANIMALS.name_of(Dog) == ANIMALS.name_of(Dog()) == "dog"
    assert ANIMALS.name_of(Stray) == f"{__name__}.Stray"


def test_a_name_that_is_taken_raises_and_keeps_the_first() -> None:
    with pytest.raises(ValueError, match="'dog' is registered twice"):
        ANIMALS.register("dog")(Stray)
    assert ANIMALS.resolve("dog") is Dog


def test_an_unknown_name_lists_all_names_and_the_nearest() -> None:
    text = message(lambda: ANIMALS.resolve("donky"))
    assert "'donky'" in text and "did you mean donkey?" in text and "dog, donkey, fish" in text
    assert "did you mean" not in message(lambda: ANIMALS.resolve("xyzzy"))


def test_build_takes_a_name_a_spec_a_class_path_or_an_object() -> None:
    assert ANIMALS.build("dog").sound() == "woof "
    assert ANIMALS.build({"class_path": "dog", "init_args": {"times": 2}}).sound() == "woof woof "
    assert ANIMALS.build({"class_path": "fish", "init_args": None}).sound() == ""
    assert type(ANIMALS.build(f"{__name__}.Stray")) is Stray
    dog = Dog(3)
    assert ANIMALS.build(dog) is dog


@pytest.mark.parametrize("built", [Dog(4), Donkey(2.5, [1, 2]), Fish(), Stray(2)], ids=lambda a: type(a).__name__)
def test_a_spec_is_plain_data_that_builds_an_equal_object(built: Animal) -> None:
    spec = ANIMALS.spec(built)
    again = ANIMALS.build(spec)
    assert type(again) is type(built) and vars(again) == vars(built)
    assert spec["class_path"] == ANIMALS.name_of(built) and spec["init_args"] == vars(built)


def test_a_class_that_forgets_its_argument_is_named_when_its_spec_is_wanted() -> None:
    text = message(lambda: ANIMALS.spec(Forgetful("blue")))
    assert "Forgetful" in text and "colour" in text


def test_unknown_missing_and_wrong_options_are_named() -> None:
    text = message(lambda: ANIMALS.build({"class_path": "donkey", "init_args": {"pich": 3}}))
    assert "donkey" in text and "'pich'" in text and "pitch, ears" in text
    assert "its options: none" in message(lambda: ANIMALS.build({"class_path": "fish", "init_args": {"fins": 2}}))
    assert "'pitch' is required" in message(lambda: ANIMALS.build("donkey"))
    assert "frequency" in message(lambda: ANIMALS.build({"class_path": "donkey", "init_args": {"pitch": -1}}))
    assert "Mute" in message(lambda: ANIMALS.build(f"{__name__}.Mute"))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no_such_module.Cat", "no_such_module"),
        (f"{__name__}.Cat", "no class 'Cat'"),
        (f"{__name__}.message", "not a subclass"),
        ("collections.Counter", "not a subclass"),
        ("", "''"),
        (".", "'.'"),
        (".Cat", "'.Cat'"),
        ("..Cat", "'..Cat'"),
        ("registry.", "'registry.'"),
    ],
)
def test_a_class_path_that_leads_nowhere_is_named(path: str, says: str) -> None:
    assert says in message(lambda: ANIMALS.resolve(path))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import a_package_nobody_has\n", "a_package_nobody_has"),
        ("def broken(:\n", "SyntaxError"),
        ("raise ValueError('left\\nright')\n", "ValueError"),
    ],
)
def test_a_module_of_the_users_that_cannot_be_imported_says_why(write_module, source: str, says: str) -> None:
    write_module("stable", source)
    text = message(lambda: ANIMALS.resolve("stable.Horse"))
    assert "stable" in text and says in text


def test_a_class_of_the_users_works_by_its_path(write_module) -> None:
    write_module(
        "paddock",
        f"from {__name__} import Animal\n"
        "class Horse(Animal):\n"
        "    def __init__(self, mane: str = 'long') -> None:\n"
        "        self.mane = mane\n"
        "    def sound(self) -> str:\n"
        "        return 'neigh'\n",
    )
    horse = ANIMALS.build({"class_path": "paddock.Horse", "init_args": {"mane": "short"}})
    assert ANIMALS.spec(horse) == {"class_path": "paddock.Horse", "init_args": {"mane": "short"}}


@pytest.mark.parametrize(
    "spec",
    [
        3,
        None,
        ["dog"],
        {},
        {"init_args": {}},
        {"class_path": "dog", "arguments": {}},
        {"class_path": 3},
        {"class_path": None},
        {"class_path": "dog", "init_args": 3},
        {"class_path": "dog", "init_args": ["times"]},
        {"class_path": "dog", "init_args": "times"},
    ],
    ids=repr,
)
def test_a_malformed_spec_is_refused_in_one_line(spec: object) -> None:
    message(lambda: ANIMALS.build(spec))


def test_exit_codes() -> None:
    assert (InputError.exit_code, BudgetMismatch.exit_code) == (2, 3)
    assert issubclass(BudgetMismatch, InputError)
