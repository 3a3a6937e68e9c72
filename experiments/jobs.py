"""Trainings and sweeps of the ladder as jobs: the command, what it needs first, and the file that says it is done.

What a job needs is read from its configuration, so that this list and the YAML files cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LADDER, SWEEPS = Path("experiments/ladder"), Path("sweeps/ladder")
RUNS = Path("runs")
PAIRS = (
    ("7m", "4m"), ("12m", "7m"), ("20m", "12m"), ("36m", "20m"), ("63m", "36m"), ("mamba2-12m", "mamba2-6m"),
)  # fmt: skip
# T, and windows of it: longer contexts are fewer, for a book holds fewer of them.
WINDOWS = {512: 2000, 1024: 2000, 2048: 2000, 4096: 1000, 8192: 500}
SUFFIX = 64
# Linear pruning to nothing still costs up to 1.6 % too much at T = 512 (sweeps/ladder/pair_512.yaml).
TOLERANCE_AT_512 = 0.016
# Pairs trained again from other seeds, and the layer of each that looks, as its first training chose it.
SEEDS, SEEDED = (1, 2), {("7m", "4m"): 0.75, ("12m", "7m"): 0.6}
TOKENS_AT_ONCE = 65_536
# A layer's price on plain text counts ten times what it gains on far tokens, summed over both T: this rule gives the
# layers that the README's table was made with.
CHOSEN_AT, WORTH_OF_FAR = (512, 1024), 0.1


@dataclass
class Job:
    """One command of simba-lab. ``needs`` names other jobs; ``choose``: the rung whose layer those have chosen."""

    name: str
    arguments: list[str]
    done: Path
    needs: tuple[str, ...] = ()
    training: bool = False
    choose: str | None = None

    def command(self) -> list[str]:
        """Arguments of Python, once all it needs is done; a training goes on from its last checkpoint."""
        more = [] if self.choose is None else ["--set", f"arms.2.criterion.init_args.layer={layer_of(self.choose)}"]
        if self.training and (self.done.parent / "checkpoints" / "last.ckpt").is_file():
            more = ["--ckpt_path", "last"]
        return ["-m", "simba_lab", *self.arguments, *more]

    def is_done(self) -> bool:
        """A training is done when its record says so; it may have been stopped."""
        if not self.training:
            return self.done.exists()
        return self.done.exists() and json.loads(self.done.read_text())["status"] == "done"


def all_jobs() -> dict[str, Job]:
    """By name, the first ones first wherever there is a choice."""
    found = [*trainings()]
    for big, small in PAIRS:
        found += [*lookahead(big, small), *searches(big, small), *looks(big)]
        found += [pair(big, small, length) for length in WINDOWS]
    found += [*from_other_seeds()]
    return {job.name: job for job in found}


def trainings() -> Iterator[Job]:
    for path in sorted(LADDER.glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        before = [Path(text).parts[2] for text in _strings(values) if text.startswith(f"{RUNS}/{LADDER.name}/")]
        needs = tuple(sorted({f"fit-{rung}" for rung in before if rung != path.stem}))
        yield Job(
            f"fit-{path.stem}", ["fit", "--config", str(path)], RUNS / LADDER.name / path.stem / "run.json", needs, True
        )


def sweep(name: str, config: str, values: Mapping[str, object], after: Iterable[str] = ()) -> Job:
    """A sweep into runs/sweeps/NAME, some values of its file replaced."""
    values = {**values, "folder": RUNS / "sweeps" / name}
    path = SWEEPS / f"{config}.yaml"
    arguments = ["sweep", "--config", str(path)]
    for key, value in values.items():
        arguments += ["--set", f"{key}={value}"]
    needs = tuple(_fit_of(text) for text in sorted(_experiments(path, values)))
    return Job(name, arguments, RUNS / "sweeps" / name / "results.json", (*needs, *after))


def lookahead(big: str, small: str) -> Iterator[Job]:
    """The layer that looks, chosen on validation books; then that layer on test books at every T."""
    chosen = [f"lookahead-{big}-choice-{length}" for length in CHOSEN_AT]
    for name, length in zip(chosen, CHOSEN_AT, strict=True):
        sizes = {"n_context": length - SUFFIX, "batch_size": TOKENS_AT_ONCE // length}
        yield sweep(name, "lookahead_layer", _rungs(big, "arms.1", small) | sizes)
    for length in WINDOWS:
        name = f"lookahead-{big}-untaught-first-{length}"
        job = sweep(name, "lookahead_text", _rungs(big, "arms.1", small) | _sizes(length), chosen)
        job.choose = big
        yield job


def pair(big: str, small: str, length: int) -> Job:
    config = "pair_512" if length == 512 else "pair"
    return sweep(f"pair-{big}-{length}", config, _rungs(big, "arms.0", small) | _sizes(length))


def searches(big: str, small: str) -> Iterator[Job]:
    """Keep curves at the smaller rung's FLOPs, and at 0.39 of the rung's own."""
    yield sweep(f"search-{big}", "search", _rungs(big, "arms.2", small))
    full = {"windows": 2000, "search.windows": 400, "dtype": "bf16"}
    yield sweep(f"search-low-{big}", "search_low", {"experiment": LADDER / f"{big}.yaml"} | full)


def looks(rung: str) -> Iterator[Job]:
    """Highways, and the six benchmarks in the line width of the books."""
    folder, needs = RUNS / LADDER.name / rung, (f"fit-{rung}",)
    flow, tasks = RUNS / f"flow-{rung}.json", RUNS / f"tasks-{rung}.json"
    seen = ["--split", "validation", "--passage", "3", "--flow", "--flow-windows", "4"]
    pages = ["--out", str(flow.with_suffix(".html")), "--json", str(flow)]
    yield Job(f"flow-{rung}", ["inspect", "--checkpoint", str(folder), *seen, *pages], flow, needs)
    asked = ["--tasks", "paper6", "--line-width", "70", "--limit", "500", "--batch-size", "64", "--json", str(tasks)]
    arms = ["--arms", "dense", "linear:global_impact@0.55", "linear:recency@0.55"]
    yield Job(f"tasks-{rung}", ["eval", "--checkpoint", str(folder), *asked, *arms], tasks, needs)


def from_other_seeds() -> Iterator[Job]:
    """Trainings that differ in nothing but the seed, and the claim's columns from each."""
    for seed in SEEDS:
        for rung in sorted({rung for pair in SEEDED for rung in pair}):
            folder = RUNS / LADDER.name / f"{rung}-seed{seed}"
            given = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
            arguments = ["fit", "--config", str(LADDER / f"{rung}.yaml"), *given]
            yield Job(f"fit-{folder.name}", arguments, folder / "run.json", training=True)
        for (big, small), layer in SEEDED.items():
            values = {"experiment": _of_seed(big, seed), "arms.0.experiment": _of_seed(small, seed)}
            values |= {f"arms.{place}.criterion.init_args.layer": layer for place in (6, 7)}
            for length in WINDOWS:
                wider = {"budget.tolerance": TOLERANCE_AT_512} if length == 512 else {}
                yield sweep(f"retrained-{big}-seed{seed}-{length}", "again", values | wider | _sizes(length))


def _of_seed(rung: str, seed: int) -> Path:
    """The configuration that a training saved with its run: the rung's own, but for seed and folder."""
    return RUNS / LADDER.name / f"{rung}-seed{seed}" / "config.yaml"


def _fit_of(experiment: str) -> str:
    """Name of the training of an experiment's file, or of the file that a run saved."""
    path = Path(experiment)
    return f"fit-{path.parent.name if path.name == 'config.yaml' else path.stem}"


def layer_of(rung: str) -> float:
    """The layer that looks, from the results of both choices: least plain loss + far loss / 10."""
    found = [json.loads((RUNS / f"sweeps/lookahead-{rung}-choice-{t}/results.json").read_text()) for t in CHOSEN_AT]
    ahead = [[arm for arm in one["arms"] if arm.get("criterion") == "lookahead_impact"] for one in found]

    def price(place: int) -> float:
        return sum(arms[place]["difference"] + WORTH_OF_FAR * arms[place]["difference_far"] for arms in ahead)

    layers = _layers()
    return layers[min(range(len(layers)), key=price)]


def _layers() -> list[float]:
    """The single layers of lookahead_layer.yaml's first arm with a schedule, which are the first that look ahead."""
    config = yaml.safe_load((SWEEPS / "lookahead_layer.yaml").read_text())
    first = next(arm["criterion"] for arm in config["arms"] if "schedule" in arm)
    layers = [criterion["init_args"]["layer"] for criterion in first]
    return [layer for layer in layers if not isinstance(layer, list)]


def _rungs(big: str, arm: str, small: str) -> dict[str, object]:
    return {"experiment": LADDER / f"{big}.yaml", f"{arm}.experiment": LADDER / f"{small}.yaml"}


def _sizes(length: int) -> dict[str, object]:
    return {"n_context": length - SUFFIX, "windows": WINDOWS[length], "batch_size": TOKENS_AT_ONCE // length}


def _experiments(path: Path, values: Mapping[str, object]) -> set[str]:
    """Experiments of a sweep's file after the replacements."""
    config = yaml.safe_load(path.read_text())
    found = {"experiment": config["experiment"]}
    found |= {f"arms.{n}.experiment": arm["experiment"] for n, arm in enumerate(config["arms"]) if "experiment" in arm}
    found |= {key: str(value) for key, value in values.items() if key.endswith("experiment")}
    return set(found.values())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
