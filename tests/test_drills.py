"""Windows that drill recall: what is stated in them is asked for, and only that is scored."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from simba_lab.data import DrillData, TextData
from simba_lab.errors import InputError

ASKED = re.compile(r"The secret of (\w+) is|\[ (\w+) =")
PLAIN = {"length": 256, "facts": 4, "text_share": 0.0, "vocab_size": 300}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> tiny.Lab:
    return tiny.lab(tmp_path_factory.getbasetemp())


def drills(lab: tiny.Lab, **changes: Any) -> DrillData:
    return DrillData(**{**PLAIN, "source": str(lab.text), "cache_dir": str(lab.cache), **changes})


def items(data: TextData, split: str = "train") -> list[dict[str, torch.Tensor]]:
    windows = data.dataset(split)
    return [windows[index] for index in range(min(40, len(windows)))]


@pytest.mark.parametrize("length", [150, 256])
def test_every_answer_stands_once_before_behind_the_same_key_and_nothing_else_is_scored(
    lab: tiny.Lab, length: int
) -> None:
    data = drills(lab, length=length)
    decode, asked = data.tokenizer.decode, 0
    for item in items(data):
        tokens, labels = item["tokens"].tolist(), item["labels"].tolist()
        assert len(tokens) == len(labels) == length
        places = [place for place, label in enumerate(labels) if label >= 0]
        starts = [place for place in places if place - 1 not in places]
        assert 1 <= len(starts) <= 4
        for start in starts:
            end = next(place for place in range(start, length + 1) if place not in places)
            question = decode(tokens[: start + 1]).rsplit("\n\n", 1)[1]
            assert ASKED.fullmatch(question), question
            answer = decode(labels[start:end])
            assert decode(tokens[: start + 1]).count(question + answer) == 1, "stated once, and before the question"
            assert decode(tokens[: start + 1]).count(question) == 2, "nothing else is said of this key"
            asked += 1
        assert all(tokens[place + 1] == labels[place] for place in places if place + 1 < length)
    assert asked > 60


def test_the_text_itself_stays_in_order_and_fills_the_window(lab: tiny.Lab) -> None:
    data = drills(lab, facts=1)
    plain = TextData(source=str(lab.text), cache_dir=str(lab.cache), length=256, vocab_size=300)
    for drilled, whole in zip(items(data), items(plain), strict=True):
        assert not torch.equal(drilled["tokens"], whole["tokens"])
        left = iter(drilled["tokens"].tolist())
        kept = 0
        for token in whole["tokens"].tolist():
            if token not in left:
                break
            kept += 1
        assert kept >= 20, "text stands between what is planted"


def test_text_share_leaves_windows_whole_and_the_test_split_is_plain(lab: tiny.Lab) -> None:
    whole = [bool((item["labels"] >= 0).all()) for item in items(drills(lab, text_share=0.5))]
    assert 8 <= sum(whole) <= 32
    assert not any((item["labels"] >= 0).all() for item in items(drills(lab, text_share=0.5), "validation"))
    data = drills(lab)
    plain = TextData(source=str(lab.text), cache_dir=str(lab.cache), length=256, vocab_size=300)
    for one, other in zip(items(data, "test"), items(plain, "test"), strict=True):
        assert torch.equal(one["tokens"], other["tokens"]) and torch.equal(one["labels"], other["labels"])


def test_an_item_is_a_function_of_seed_and_split(lab: tiny.Lab) -> None:
    def first(split: str = "train", **changes: Any) -> list[int]:
        return items(drills(lab, **changes), split)[0]["tokens"].tolist()

    assert first() == first() != first(seed=1)
    assert first() != first(facts=1)
    assert first("validation") == first("validation") != first("validation", seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": 0}, "data.facts"),
        ({"text_share": 1.0}, "data.text_share"),
        ({"length": 63}, "data.length"),
        ({"length": 64, "tokenizer": "bytes"}, "data.length: a window has no room"),
    ],
)
def test_what_does_not_fit_is_refused(lab: tiny.Lab, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        items(drills(lab, **changes))


def test_fit_drills_and_reports_plain_text(lab: tiny.Lab, tmp_path: Path) -> None:
    init_args = {**PLAIN, "source": str(lab.text), "cache_dir": str(lab.cache), "length": 150, "batch_size": 4}
    init_args |= {"validation_windows": 4, "test_windows": 4, "facts": 2, "text_share": 0.25}
    values = tiny.EXPERIMENT | {"data": {"class_path": "simba_lab.data.DrillData", "init_args": init_args}}
    changes = {"trainer.default_root_dir": str(tmp_path / "run"), "trainer.max_steps": 2}
    assert tiny.simba_lab("fit", "--config", tiny.write_yaml(tmp_path / "drill.yaml", values, changes)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tested = next(row for row in rows if "test/loss" in row)
    assert tested["test/loss"] == pytest.approx(math.log(300), abs=0.3) and 4 < tested["test/bits_per_byte"] < 8
