"""A page about a run's weights, for whoever gets the folder: every number on it is read from the run's own record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from simba_lab.checkpoint.weights import SAFETENSORS_FILE, read_json
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel

CARD_FILE = "README.md"
RECORD = CONFIG, RUN, METRICS = "config.yaml", "run.json", "metrics.jsonl"
"""What `simba-lab fit` leaves beside the weights: settings, what it cost and on what, and the curves."""


def write_card(folder: Path, model: LanguageModel, name: str) -> None:
    """Writes the card of the run whose record and weights lie in ``folder``.

    Raises InputError for a record that is missing, is of an unfinished run, or lacks what the card must say.
    """
    missing = [file for file in RECORD if not (folder / file).is_file()]
    if missing:
        raise InputError(f"card: the source has no {missing[0]}; a finished run of `simba-lab fit` has one")
    run, config = read_json(folder / RUN), yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        if run["status"] != "done":
            raise InputError(f"card: the run is {run['status']}, not done; finish it first")
        rows = [*_about_model(model, folder), *_about_training(run, config), *_about_quality(folder)]
        limits = list(_limits(model, config))
    except (KeyError, TypeError) as error:
        raise InputError(f"card: the run's record lacks {error}; it was not written by `simba-lab fit`") from None
    table = "".join(f"| {key} | {value} |\n" for key, value in rows)
    points = "".join(f"- {limit}\n" for limit in limits)
    (folder / CARD_FILE).write_text(
        f"# {name}\n\nWritten by `simba-lab convert --card`; every number is from {', '.join(RECORD)} and the weights "
        f"beside this page.\n`simba_lab.load` takes the folder.\n\n| | |\n|---|---|\n{table}\n## Limits\n\n{points}",
        encoding="utf-8",
    )


def _about_model(model: LanguageModel, folder: Path) -> Iterator[tuple[str, str]]:
    config = model.config
    total = sum(weight.numel() for weight in model.parameters())
    embedding = model.backbone.embedding.weight
    yield "model", f"{config.layer}, {config.n_layer} layers, width {config.d_model}, state {config.d_state}"
    yield "vocabulary", f"{config.vocab_size:,} ids"
    yield "parameters", f"{total:,}, {total - embedding.numel():,} of them beside the embedding"
    megabytes = (folder / SAFETENSORS_FILE).stat().st_size / 1e6
    yield "weights", f"{str(embedding.dtype).removeprefix('torch.')}, {megabytes:.1f} MB"


def _about_training(run: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data, trainer, environment = config["data"]["init_args"], config["trainer"], run["environment"]
    if config["model"].get("weights"):
        yield "started from", f"`{config['model']['weights']}`"
    yield "trained on", f"`{data['source']}`"
    if data.get("recall_share"):
        yield "woven into it", f"{100 * data['recall_share']:g} % recall material (`simba_lab.data.recall_text`)"
    yield "tokens", f"{run['tokens']:,} in {run['step']:,} steps, sequences of {data['length']:,}"
    yield "training FLOPs", f"{run['training_flops']:,} ({run['convention']})"
    hardware = environment.get("gpu") or environment.get("cpu")
    yield "time", f"{run['seconds']:,.0f} s on {run['processes']} x {hardware}, {trainer['precision']}"
    yield "command", f"`{run['command'].replace('__main__.py', 'simba-lab')}`"
    yield "versions", ", ".join(f"{key} {environment[key]}" for key in ("python", "torch", "lightning", "tokenizers"))


def _about_quality(folder: Path) -> Iterator[tuple[str, str]]:
    """What the fit measured at its end on its own test text."""
    last: dict[str, float] = {}
    for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    yield "test loss", f"{last['test/loss']:.4f} nats per token, accuracy {last['test/accuracy']:.4f}"
    if "test/bits_per_byte" in last:
        theirs = f"; `xz -9` of the same text: {last['test/xz_bits_per_byte']:.4f}"
        yield "test bits per byte", f"{last['test/bits_per_byte']:.4f}{theirs}"


def _limits(model: LanguageModel, config: Mapping[str, Any]) -> Iterator[str]:
    data, precision = config["data"]["init_args"], config["trainer"]["precision"]
    tested = f"`{data['test_source']}`" if data.get("test_source") else f"a part of `{data['source']}` held out"
    yield f"Test numbers are of {tested}, by the fit itself ({precision}); they say nothing about other text."
    if model.backbone.embedding.weight.dtype.itemsize < 4:
        yield "They were measured with the weights as trained, before these were rounded to the dtype above."
    yield f"Trained on sequences of {data['length']:,} tokens; longer ones are beyond what it has seen."
    yield "A language model for measurements: it follows no instructions, and nothing it writes was checked."
