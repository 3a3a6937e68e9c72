"""The recall tasks: every answer follows from the context, examples depend on (seed, split, index) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from simba_lab.data import MultiQueryRecall, Needle, RecallData
from simba_lab.errors import InputError


@settings(deadline=None, max_examples=80)
@given(data=st.data(), n_pairs=st.integers(1, 9), index=st.integers(0, 10**6))
def test_mqar_answers_follow_from_the_pairs(data, n_pairs: int, index: int) -> None:
    n_queries = data.draw(st.integers(1, n_pairs))
    n_suffix = data.draw(st.none() | st.integers(2 * n_queries - 1, 40))
    length = 2 * n_pairs + data.draw(st.integers(n_suffix or 2 * n_queries - 1, 60))
    tokens, labels = MultiQueryRecall(41, length, n_pairs, n_queries, n_suffix).example(3, 0, index)
    assert tokens.shape == labels.shape == (length,) and tokens.dtype == labels.dtype == np.int64
    keys, values = tokens[0 : 2 * n_pairs : 2], tokens[1 : 2 * n_pairs : 2]
    assert set(keys) <= set(range(1, 21)) and set(values) <= set(range(21, 41)) and len(set(keys)) == n_pairs
    asked = np.flatnonzero(labels != -100)
    assert len(asked) == n_queries == len(set(tokens[asked]))
    assert asked.min() >= (2 * n_pairs if n_suffix is None else length - n_suffix)
    pairs = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert [pairs[key] for key in tokens[asked].tolist()] == labels[asked].tolist()
    followed = asked[asked < length - 1]
    assert (tokens[followed + 1] == labels[followed]).all()
    rest = np.setdiff1d(np.arange(2 * n_pairs, length), np.concatenate([asked, asked + 1]))
    assert (tokens[rest] == 0).all()


def test_mqar_gaps_follow_a_power_law() -> None:
    task = MultiQueryRecall(64, 200, 4, 1)
    first = [np.flatnonzero(task.example(0, 0, i)[1] != -100)[0] - 8 for i in range(2000)]
    weights = np.arange(1, 97) ** -0.99
    expected = (np.arange(96) * 2 * weights).sum() / weights.sum()
    assert np.mean(first) == pytest.approx(expected, rel=0.1) and np.median(first) < expected


@settings(deadline=None, max_examples=80)
@given(data=st.data(), n_pairs=st.integers(1, 6), index=st.integers(0, 10**6))
def test_needle_stands_at_its_distance(data, n_pairs: int, index: int) -> None:
    n_suffix = data.draw(st.none() | st.integers(1, 9))
    length = 2 * n_pairs + 2 + (n_suffix or 1) + data.draw(st.integers(0, 30))
    distance = data.draw(st.integers((n_suffix or 1) + 1, length - 1))
    tokens, labels = Needle(61, length, n_pairs, distance, n_suffix).example(1, 0, index)
    assert (labels[:-1] == -100).all() and tokens.shape == (length,)
    question = length - 1
    assert tokens[question] == tokens[question - distance] and labels[-1] == tokens[question - distance + 1]
    keys = np.flatnonzero((tokens[:-1] >= 1) & (tokens[:-1] <= 20))
    values = np.flatnonzero((tokens >= 21) & (tokens <= 40))
    assert len(keys) == n_pairs == len(set(tokens[keys])) and (values == keys + 1).all()
    assert (tokens != 0).all() and values.max() < length - (n_suffix or 1)


def test_needle_distances_are_drawn_between_bounds() -> None:
    def distances(distance) -> set[int]:
        task = Needle(61, 30, 2, distance, 5)
        return {29 - np.flatnonzero(t[:-1] == t[-1])[0] for t, _ in (task.example(0, 0, i) for i in range(400))}

    assert distances((7, 9)) == {7, 8, 9} and distances(None) == set(range(6, 30))


@pytest.mark.parametrize("task", ["mqar", "needle"])
def test_example_depends_on_seed_split_and_index_alone(task: str) -> None:
    def data(**options) -> RecallData:
        return RecallData(task, length=40, n_pairs=4, train_examples=37, validation_examples=9, batch_size=5, **options)

    tokens, labels = data().examples("train")
    assert tokens.shape == labels.shape == (37, 40) and len(np.unique(tokens, axis=0)) == 37
    assert (data(num_workers=0).examples("train", 12)[0] == tokens[:12]).all()
    assert not (data(seed=1).examples("train")[0] == tokens).all(axis=1).any()
    assert not (data().examples("validation", 9)[0] == tokens[:9]).all(axis=1).any()
    assert not (data().examples("test")[0] == data().examples("validation")[0]).all(axis=1).any()
    batches = list(data(num_workers=2).train_dataloader())
    assert [batch["tokens"].shape for batch in batches] == [(5, 40)] * 7
    rows = {tuple(row) for row in tokens.tolist()}
    assert all(tuple(row) in rows for batch in batches for row in batch["tokens"].tolist())
    held = torch.cat([batch["labels"] for batch in data().val_dataloader()])
    assert (held.numpy() == data().examples("validation")[1]).all() and held.dtype == torch.int64


def test_loader_continues_where_it_was_saved() -> None:
    def loader():
        return RecallData(length=40, n_pairs=4, train_examples=37, batch_size=5).train_dataloader()

    first = loader()
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    rest = [batch["tokens"] for batch in iterator] + [batch["tokens"] for batch in first]
    second = loader()
    second.load_state_dict(state)
    again = [batch["tokens"] for batch in second] + [batch["tokens"] for batch in second]
    assert len(rest) == 4 + 7 and len(again) == 7 + 7 and all(map(torch.equal, rest, again))


@pytest.mark.parametrize(
    "options, key",
    [
        ({"task": "copy"}, "task"),
        ({"length": 0}, "length"),
        ({"batch_size": 0}, "batch_size"),
        ({"train_examples": 0}, "train_examples"),
        ({"validation_examples": 0}, "validation_examples"),
        ({"seed": -1}, "seed"),
        ({"n_pairs": 200}, "n_pairs"),
        ({"n_pairs": 4, "n_queries": 5}, "n_queries"),
        ({"length": 20, "n_pairs": 8}, "length"),
        ({"n_suffix": 128}, "n_suffix"),
        ({"length": 40, "n_suffix": 30}, "n_suffix"),
        ({"distance": 9}, "distance"),
        ({"task": "needle", "n_queries": 2}, "n_queries"),
        ({"task": "needle", "distance": 128}, "distance"),
        ({"task": "needle", "distance": 1}, "distance"),
        ({"task": "needle", "distance": 9, "n_suffix": 9}, "distance"),
        ({"task": "needle", "distance": [50, 40]}, "distance"),
        ({"task": "needle", "distance": [50]}, "distance"),
        ({"task": "needle", "length": 17, "n_pairs": 8}, "n_pairs"),
    ],
)
def test_values_out_of_range_name_their_key(options: dict, key: str) -> None:
    with pytest.raises(InputError, match=f"^data.{key}: ") as error:
        RecallData(**options)
    assert "\n" not in str(error.value)


def test_configuration_files_can_name_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RecallData, "data")
    options = ["--data.task=needle", "--data.distance=[20,30]", "--data.n_suffix=8"]
    data = parser.instantiate(parser.parse_args(["--data=simba_lab.data.RecallData", *options])).data
    assert data.task == Needle(256, 128, 8, (20, 30), 8)
