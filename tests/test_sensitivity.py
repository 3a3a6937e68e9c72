"""Layer sensitivities: every number of the table, and the schedule that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_evaluate import dense as dense  # fixtures
from test_evaluate import windows as windows

from simba_lab.data import EvalWindows
from simba_lab.errors import InputError
from simba_lab.evaluate.sensitivity import Sensitivity, layer_sensitivity
from simba_lab.evaluate.windows import far_face, plain_face, score_windows
from simba_lab.model import LanguageModel, ModelConfig

RATES = (0.4, 0.1)


@pytest.mark.parametrize("reach", [None, 4])
def test_the_table_is_the_loss_of_each_cut_above_dense(
    dense: LanguageModel, windows: EvalWindows, reach: int | None
) -> None:
    told: list[tuple[int, int]] = []
    found = layer_sensitivity(
        dense, windows, RATES, "norm", 0.2, batch_size=3, reach=reach, progress=lambda *done: told.append(done)
    )
    assert told == [(done, 5) for done in range(1, 6)]

    def loss(model: LanguageModel) -> float:
        nll = score_windows(model, windows, 3).nll
        return (plain_face(nll, windows) if reach is None else far_face(nll, windows, reach)).mean

    assert found.dense == loss(dense)
    assert found.rise.shape == found.low.shape == found.high.shape == (2, 2)
    for layer in (1, 2):
        for place, rate in enumerate(RATES):
            cut = dense.sparsified("norm", "highway_top", protect_recent=0.2, from_layer=layer, keep=rate)
            assert found.rise[layer - 1, place] == pytest.approx(loss(cut) - found.dense, abs=1e-9)
    assert (found.low <= found.rise).all() and (found.rise <= found.high).all() and (found.low < found.high).all()
    assert np.abs(found.rise).min() > 1e-6


def test_it_is_plain_data_and_a_schedule(dense: LanguageModel, windows: EvalWindows) -> None:
    found = layer_sensitivity(dense, windows, RATES)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["criterion"]["class_path"] == "global_impact" and plain["windows"] == len(windows)
    assert plain["rise"] == found.rise.tolist() and np.shape(plain["interval"]) == (2, 2, 2)
    assert (plain["n_context"], plain["n_suffix"]) == (windows.n_context, windows.n_suffix)
    sparse = dense.sparsified("global_impact", plain["schedule"], mean_keep=0.6)
    counts = sparse.keep_counts(100)
    assert sum(counts) == pytest.approx(180, abs=2) and counts[-1] >= 10


def test_the_command_measures_a_run_and_its_schedule_prunes(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, result = tiny.lab(tmp_path_factory.getbasetemp()), tmp_path / "sensitivity.json"
    window = ("--checkpoint", lab.run, "--n-context", 96, "--n-suffix", 16, "--windows", 6)
    given = map(str, (*window, "--rates", 0.5, 0.1, "--criterion", "recency", "--json", result))
    assert tiny.simba_lab("sensitivity", *given) == 0
    printed, found = capsys.readouterr().out, json.loads(result.read_text(encoding="utf-8"))
    assert np.shape(found["rise"]) == (3, 2) and found["split"] == "validation" and found["windows"] == 6
    assert f"{1000 * found['rise'][2][1]:+.1f}" in printed and f"{found['dense']:.4f}" in printed
    schedule = json.dumps(found["schedule"])
    flops = ("flops", "--checkpoint", lab.run, "--schedule", schedule, "--mean-keep", "0.5", "--n-context", "96")
    assert tiny.simba_lab(*flops, "--n-suffix", "16") == 0
    assert "--batch-size must be" in tiny.mistake(capsys, "sensitivity", *map(str, window), "--batch-size", "0")


def test_facts_can_be_planted_and_the_layer_that_reads_them_is_named(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, result = tiny.lab(tmp_path_factory.getbasetemp()), tmp_path / "sensitivity.json"
    window = ("--checkpoint", lab.run, "--n-context", 160, "--n-suffix", 16, "--windows", 6, "--criterion", "recency")
    asked = (*window, "--rates", 0.1, "--recall", "pair", "--facts", 2)
    assert tiny.simba_lab("sensitivity", *map(str, (*asked, "--distance", 40, "--json", result))) == 0
    found, printed = json.loads(result.read_text(encoding="utf-8")), capsys.readouterr().out
    assert found["recall"] == {"form": "pair", "distance": 40, "facts": 2}
    assert found["reading_layer"] is None or f"looked up in layer {found['reading_layer']}:" in printed
    assert tiny.simba_lab("sensitivity", *map(str, (*window, "--rates", 0.1, "--json", result))) == 0
    plain = json.loads(result.read_text(encoding="utf-8"))
    assert plain["recall"] is None and "looked up" not in capsys.readouterr().out
    assert plain["dense"] != found["dense"] and plain["rise"] != found["rise"]
    assert "recall.distance: 400 tokens" in tiny.mistake(capsys, "sensitivity", *map(str, asked), "--distance", "400")


@pytest.mark.parametrize(
    ("rise", "layer"),
    [([4.0, 4.1, 3.9, 0.2, 0.1], 3), ([0.1, 0.2, 0.3, 0.4, 0.5], 5), ([3.0, 0.1, 0, -0.1, 0], 1), ([0.0] * 5, None)],
)
def test_the_reading_layer_is_the_last_that_a_cut_before_it_harms(rise: list[float], layer: int | None) -> None:
    table = np.stack([np.full(5, 9.0), rise], axis=1)
    found = Sensitivity({}, (0.5, 0.1), table, table, table, 1.0, 4, 100, 10, None)
    assert found.reading_layer == layer


@pytest.mark.parametrize(
    ("rates", "reach", "says"),
    [
        ((0.1, 0.4), None, "rates must fall"),
        ((), None, "rates must hold"),
        ((0.5,), 10_000, "reach: no suffix token was last seen more than 10000 tokens"),
    ],
)
def test_a_mistake_is_named(
    dense: LanguageModel, windows: EvalWindows, rates: tuple[float, ...], reach: int | None, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        layer_sensitivity(dense, windows, rates, reach=reach)


def test_a_model_of_one_layer_has_none(windows: EvalWindows) -> None:
    with pytest.raises(InputError, match="one layer"):
        layer_sensitivity(LanguageModel(ModelConfig(d_model=8, n_layer=1, vocab_size=16)), windows)
