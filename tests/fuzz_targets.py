"""Everything we parse, each as a target of :mod:`fuzzing`: sound input, spoilt by the case's own generator."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
import yaml
from fuzzing import SCALARS, spoilt_bytes, spoilt_text, spoilt_tree

from simba_lab.cli.main import main

Case = Callable[[], int]
Target = Callable[[random.Random, Path], Case]
TARGETS: dict[str, Callable[[Path], Target]] = {}
BENCH = Path(__file__).resolve().parent.parent / "experiments" / "bench" / "kernels-scan.json"


def target(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
    TARGETS[make.__name__] = make
    return make


def make_seeds(lab: tiny.Lab, folder: Path) -> Path:
    """Sound input for every target: the lab's runs, its sweep, foreign folders, results, a bench."""
    from test_report import example

    from simba_lab.checkpoint import convert

    folder.mkdir()
    run = folder / "run"
    shutil.copytree(lab.run, run)
    for format in ("state-spaces", "transformers"):
        convert(lab.run, folder / format, format)
    lab.experiment(folder / "base.yaml", {"trainer.default_root_dir": str(lab.run)})
    lab.sweep(folder / "sweep.yaml")
    shutil.copy(lab.text, folder / "text.jsonl")
    (folder / "results.json").write_text(json.dumps(_few(example(search=True))), encoding="utf-8")
    return folder


def _few(results: dict[str, Any]) -> dict[str, Any]:
    """Five arms and eight trials: what a report draws is not what is tested here."""
    results["arms"] = results["arms"][:5]
    names = {arm["name"] for arm in results["arms"]}
    for key in ("not_separable", "not_separable_far"):
        results["conclusion"][key] = [name for name in results["conclusion"][key] if name in names]
    results["conclusion"]["best_far"] = results["arms"][1]["name"]
    results["search"] = {"trials": results["search"]["trials"][:8], "best": 5}
    return results


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1)


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def call(*arguments: Any) -> Case:
    return lambda: main([str(argument) for argument in arguments])


def quiet(function: Callable[..., Any], *arguments: Any) -> Case:
    """A parser itself, where its command would go on to compute."""

    def case() -> int:
        function(*arguments)
        return 0

    return case


def copied(source: Path, folder: Path, *changed: str) -> Path:
    """A copy of a folder by hard links, but for the files that will be changed."""
    shutil.copytree(source, folder, copy_function=_linked, ignore=lambda _, names: {*changed} & {*names})
    return folder


def _linked(source: str, place: str) -> None:
    Path(place).hardlink_to(source)


@target
def experiment(seeds: Path) -> Target:
    """An experiment file: data, model, optimiser, trainer; read and built, tasks cut from its data."""
    tree = yaml.safe_load((seeds / "base.yaml").read_text())
    tree["model"]["pruning"] = {"n_context": 96, "mean_keep": 0.6, "criterion": "norm", "schedule": "linear"}

    source = f"source: {tree['data']['init_args']['source']}\n".encode()
    tree["data"]["init_args"]["cache_dir"] = "cache"

    def make(rng: random.Random, folder: Path) -> Case:
        text = spoilt_text(rng, tree, _yaml)
        # Without its source it would read the whole embedded corpus, which takes longer than a case may.
        (folder / "e.yaml").write_bytes(text if source in text else _yaml(tree).encode())
        return call(
            "tasks", "build", "--config", "e.yaml", "--out", "tasks", "--n-context", 40, "--document-tokens", 60
        )

    return make


@target
def sweep(seeds: Path) -> Target:
    """A sweep file: read, overruled, planned; nothing is measured."""
    from simba_lab.sweep import read_sweep
    from simba_lab.sweep.plan import make_plan
    from simba_lab.sweep.search import check_search
    from simba_lab.training import read_experiment

    tree = yaml.safe_load((seeds / "sweep.yaml").read_text())
    tree["search"] = {"criterion": "norm", "trials": 3, "n_values": 2}
    base = read_experiment(Path(tree["experiment"]))
    others = {tree["arms"][0]["experiment"]: read_experiment(Path(tree["arms"][0]["experiment"]))}

    def plan(overrides: list[str]) -> None:
        config = read_sweep(Path("s.yaml"), overrides)
        known = {entry.experiment for entry in config.arms if entry.experiment} <= others.keys()
        if known:
            made = make_plan(config, base, others)
            if config.search:
                check_search(config, base, made.budget)

    def make(rng: random.Random, folder: Path) -> Case:
        (folder / "s.yaml").write_bytes(spoilt_text(rng, tree, _yaml))
        keys = ("windows", "budget.flops", "search.trials", "arms", "", ".", "a.b.c", "statistics")
        override = f"{rng.choice(keys)}{rng.choice(('=', '', '=='))}{rng.choice(SCALARS)}"
        return quiet(plan, [override] if rng.random() < 0.2 else [])

    return make


@target
def results(seeds: Path) -> Target:
    """results.json of a sweep, through table, figures and page."""
    tree = json.loads((seeds / "results.json").read_text())

    def make(rng: random.Random, folder: Path) -> Case:
        (folder / "results.json").write_bytes(spoilt_text(rng, tree, _json))
        return call("report", folder)

    return make


@target
def arm(seeds: Path) -> Target:
    """What a sweep kept of a finished arm: arm.json and nll.npy."""
    from simba_lab.evaluate.windows import WindowScores
    from simba_lab.sweep.store import ARM_FILE, NLL_FILE, ArmStore

    scores = WindowScores(np.ones((3, 4), np.float32), 1.0, {"head": 7})

    def make(rng: random.Random, folder: Path) -> Case:
        store = ArmStore(folder)
        kept, place = store.save("a", "print", scores, {"name": "a"}), store.path("a")
        if rng.random() < 0.6:
            (place / ARM_FILE).write_bytes(spoilt_text(rng, kept.record, _json))
        else:
            (place / NLL_FILE).write_bytes(spoilt_npy(rng, (place / NLL_FILE).read_bytes()))
        return quiet(lambda: (found := store.load("a", "print")) and found.flops)

    return make


def spoilt_npy(rng: random.Random, raw: bytes) -> bytes:
    lies = (
        (b"(3, 4)", b"(3000000000, 4)"),
        (b"(3, 4)", b"(-1,4)"),
        (b"<f4", b"|O "),
        (b"<f4", b"<f8"),
        (b"(3, 4)", b"(99,9)"),
    )
    return raw.replace(*rng.choice(lies)) if rng.random() < 0.4 else spoilt_bytes(rng, raw)


@target
def run_record(seeds: Path) -> Target:
    """run.json and config.yaml, from which a sweep learns whether a model is trained."""
    import dataclasses

    from simba_lab.training import read_experiment

    base = read_experiment(seeds / "base.yaml")
    record, config = json.loads((seeds / "run" / "run.json").read_text()), base.resolved

    def make(rng: random.Random, folder: Path) -> Case:
        first = rng.random() < 0.5
        (folder / "run.json").write_bytes(spoilt_text(rng, record, _json) if first else _json(record).encode())
        (folder / "config.yaml").write_bytes(_yaml(config).encode() if first else spoilt_text(rng, config, _yaml))
        return quiet(dataclasses.replace(base, folder=folder).is_trained)

    return make


@target
def model_spec(seeds: Path) -> Target:
    """model.json of our run folders."""
    return _converted(seeds / "run", "model.json")


@target
def state_spaces_config(seeds: Path) -> Target:
    """config.json of state-spaces' folders."""
    return _converted(seeds / "state-spaces", "config.json")


@target
def transformers_config(seeds: Path) -> Target:
    """config.json of transformers' folders."""
    return _converted(seeds / "transformers", "config.json")


def _converted(source: Path, name: str) -> Target:
    tree = json.loads((source / name).read_text())

    def make(rng: random.Random, folder: Path) -> Case:
        spoilt = copied(source, folder / "in", name)
        (spoilt / name).write_bytes(spoilt_text(rng, tree, _json))
        return call("convert", "in", "out", "--format", rng.choice(("run", "transformers", "state-spaces")))

    return make


@target
def safetensors(seeds: Path) -> Target:
    """model.safetensors: its header lies, or its bytes do."""
    source = seeds / "run"
    raw = (source / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def spoilt(rng: random.Random) -> bytes:
        if rng.random() < 0.25:
            return spoilt_bytes(rng, raw)
        text = _json(_lying(rng, header)).encode("utf-8", "surrogatepass")
        told = rng.choice((len(text),) * 8 + (0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1, 10**8))
        return struct.pack("<Q", told) + text + body

    def make(rng: random.Random, folder: Path) -> Case:
        copied(source, folder / "in", "model.safetensors")
        (folder / "in" / "model.safetensors").write_bytes(spoilt(rng))
        return call("convert", "in", "out", "--format", "run")

    return make


def _lying(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header with overlapping, reversed or endless places, other dtypes and shapes, or spoilt at random."""
    header = spoilt_tree(rng, header) if rng.random() < 0.5 else json.loads(json.dumps(header))
    entries = [entry for entry in header.values() if isinstance(entry, dict)] if isinstance(header, dict) else []
    if entries:
        entry = rng.choice(entries)
        entry["dtype"] = rng.choice(("F32", "F64", "I8", "BOOL", "F8_E4M3", "F4", "U64", "F16", "X"))
        entry["data_offsets"] = rng.choice(([0, 8], [8, 0], [0, 2**63], [-1, 4], [0], entry.get("data_offsets")))
        entry["shape"] = rng.choice(([2**40, 2**40], [-1], [0], [2], [], [1] * 100, entry.get("shape")))
    return header


@target
def shard_index(seeds: Path) -> Target:
    """The index of a sharded checkpoint; the names in it must not lead out of its folder."""
    source = seeds / "transformers"
    names = ("a.safetensors", "../a.safetensors", "/etc/passwd", "", ".", "config.json", "a\x00b", "x" * 400)

    def make(rng: random.Random, folder: Path) -> Case:
        copied(source, folder / "in", "model.safetensors")
        shutil.copy(source / "model.safetensors", folder / "in" / "a.safetensors")
        tree = {"metadata": {"total_size": 1}, "weight_map": {f"w{i}": rng.choice(names) for i in range(3)}}
        (folder / "in" / "model.safetensors.index.json").write_bytes(spoilt_text(rng, tree, _json))
        return call("convert", "in", "out", "--format", "run")

    return make


@target
def lightning_checkpoint(seeds: Path) -> Target:
    """A .ckpt whose content, zip or pickle is spoilt."""
    path = seeds / "run" / "checkpoints" / "last.ckpt"
    raw, content = path.read_bytes(), torch.load(path, weights_only=True)
    spec, weights = content["simba_lab_model"], content["state_dict"]

    def make(rng: random.Random, folder: Path) -> Case:
        if rng.random() < 0.6:
            (folder / "x.ckpt").write_bytes(spoilt_bytes(rng, raw))
        else:
            tree = spoilt_tree(rng, {"simba_lab_model": spec, "state_dict": dict.fromkeys(weights, 0)})
            state = tree.get("state_dict") if isinstance(tree, dict) else None
            if isinstance(state, dict):
                tree["state_dict"] = {key: _weight(rng, weights.get(key)) for key in state}
            torch.save(tree, folder / "x.ckpt")
        return call("convert", "x.ckpt", "out", "--format", "run")

    return make


def _weight(rng: random.Random, weight: torch.Tensor | None) -> Any:
    if weight is None or rng.random() < 0.05:
        return rng.choice(
            (torch.zeros(3), torch.zeros(0), torch.zeros(2, dtype=torch.int64), torch.ones(2).to_sparse(), 7)
        )
    return weight


@target
def tokenizer(seeds: Path) -> Target:
    """tokenizer.json, then text through it."""
    from simba_lab.data import Tokenizer

    tree = json.loads((seeds / "run" / "tokenizer.json").read_text())

    def use() -> None:
        read = Tokenizer.load("tokenizer.json")
        read.decode(read.encode("Erzähl mir was, 日本 <|endoftext|>\n"))

    def make(rng: random.Random, folder: Path) -> Case:
        small = {**tree, "model": {**tree["model"], "vocab": tree["model"]["vocab"]}}
        (folder / "tokenizer.json").write_bytes(spoilt_text(rng, small, _json))
        return quiet(use)

    return make


@target
def documents(seeds: Path) -> Target:
    """Text in every form in which it is read."""
    import bz2
    import gzip
    import lzma

    from simba_lab.data.sources import load_documents

    lines = [json.loads(line) for line in (seeds / "text.jsonl").read_text().splitlines()[:5]]
    forms = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress, "jsonl.xz": lzma.compress}

    def make(rng: random.Random, folder: Path) -> Case:
        raw = b"".join(spoilt_text(rng, line, json.dumps) + b"\n" for line in lines[: rng.randint(1, 5)])
        name = rng.choice((*forms, "txt", "json"))
        packed = forms.get(name, bytes)(raw)
        (folder / f"x.{name}").write_bytes(spoilt_bytes(rng, packed) if rng.random() < 0.5 else packed)
        return quiet(load_documents, f"x.{name}")

    return make


@target
def bench_results(seeds: Path) -> Target:
    """Results of ``bench``, made into a table."""
    tree = json.loads(BENCH.read_text())
    tree["lines"] = tree["lines"][:3]

    def make(rng: random.Random, folder: Path) -> Case:
        (folder / "b.json").write_bytes(spoilt_text(rng, tree, _json))
        return call("bench", "table", "b.json")

    return make


@target
def benchmark_results(seeds: Path) -> Target:
    """Results of ``eval --tasks``, compared with sound ones."""
    sound = benchmark_record()
    (seeds / "benchmarks.json").write_text(_json(sound), encoding="utf-8")

    def make(rng: random.Random, folder: Path) -> Case:
        (folder / "b.json").write_bytes(spoilt_text(rng, sound, _json))
        both = [str(seeds / "benchmarks.json"), "b.json"]
        return call("eval", "--compare", *(both if rng.random() < 0.5 else both[::-1]))

    return make


def benchmark_record() -> dict[str, Any]:
    """Two arms on two tasks of three documents."""
    from simba_lab.evaluate.benchmarks.scores import NATS, SHARE, Cost, Metric, TaskScores
    from simba_lab.evaluate.benchmarks.store import ArmScores, as_results

    def scores(name: str, right: list[float]) -> TaskScores:
        ones = np.ones(3)
        metrics = {"acc": Metric(SHARE, True, np.array(right), ones), "ppl": Metric(NATS, False, ones * 2.5, ones)}
        cost = Cost(300, 3, 3, [7.0, 4.5])
        return TaskScores(name, "1.0", 3, [0, 1, 2], ["a", "b", "c"], "acc", metrics, cost, 0.5)

    right = {"dense": [1.0, 0.0, 1.0], "linear:norm@0.6": [1.0, 0.0, 0.0]}
    arms = {name: ArmScores(name, {"pruning": None}, {t: scores(t, values) for t in ("piqa", "arc_easy")})
            for name, values in right.items()}  # fmt: skip
    return as_results(arms, {"checkpoint": "runs/base"})


@target
def answers(seeds: Path) -> Target:
    """Answers that an interrupted evaluation kept, and the experiment file beside its checkpoint."""
    from simba_lab.evaluate.answers import AnswerBook
    from simba_lab.evaluate.arguments import trained_length

    lines = [["0f" * 32, [-1.25, True]], ["1e" * 32, [-3.5, False]], ["2d" * 32, "generated text"]]
    config = yaml.safe_load((seeds / "base.yaml").read_text())

    def use() -> None:
        AnswerBook(Path("answers.jsonl")).add("key", [-1.0, True])
        trained_length(Path())

    def make(rng: random.Random, folder: Path) -> Case:
        (folder / "answers.jsonl").write_bytes(b"\n".join(spoilt_text(rng, line, json.dumps) for line in lines))
        (folder / "config.yaml").write_bytes(spoilt_text(rng, config, _yaml))
        return quiet(use)

    return make


@target
def arguments(seeds: Path) -> Target:
    """Command lines of every command, on sound files."""
    run, values = str(seeds / "run"), [str(value) for value in SCALARS if "\x00" not in str(value)]
    arms = ("dense", "linear:norm@0.6", "linear:norm@", "::@", "a:b@nan", "uniform:random@1", "linear:os.system@.5")
    known = {
        "--checkpoint": (run, "nowhere", "a/b", "state-spaces/mamba-130m"), "--arms": arms, "--format": ("run", "x"),
        "--config": (str(seeds / "base.yaml"), "none.yaml"), "--shape": ("mamba-130m", "mamba-9t"), "--out": ("o",),
        "--criterion": ("norm", "os.system", "{}", '{"class_path": "norm"}'), "--schedule": ("linear", "knots", "[]"),
        "--json": ("out.json", "no/out.json", "."), "--source": (str(seeds / "text.jsonl"), "hf:a", "*", ""),
    }  # fmt: skip
    starts: dict[str, tuple[list[str], str]] = {
        "flops": (["--d-model", "8", "--n-layer", "2", "--vocab-size", "9", "--n-context", "32"],
                  "--shape --checkpoint --d-model --n-layer --vocab-size --d-state --d-conv --expand --n-context "
                  "--n-suffix --head --criterion --schedule --mean-keep --final-keep --schedule-arg --protect-recent "
                  "--training --json"),
        "eval": (["--checkpoint", run, "--n-context", "20", "--n-suffix", "4", "--windows", "2"],
                 "--checkpoint --source --arms --split --windows --n-context --n-suffix --batch-size --device --dtype "
                 "--reach --json"),
        "generate": (["--checkpoint", run, "--prompt", "def f(", "--max-new-tokens", "2"],
                     "--checkpoint --prompt --prompt-file --criterion --schedule --mean-keep --final-keep "
                     "--max-new-tokens --temperature --top-p --seed --device --json"),
        "tasks": (["build", "--checkpoint", run, "--out", "o", "--n-context", "40", "--document-tokens", "60"],
                  "--checkpoint --config --out --split --count --n-context --n-choice --documents --document-tokens "
                  "--seed"),
        "convert": ([run, "out", "--format", "run"], "--format --dtype --json"),
        "report": (["results.json"], "--json"),
        "sweep": (["--config", "none.yaml"], "--config --set --json"),
    }  # fmt: skip

    # Kernels are compiled once, on their first use, which no case is to be charged for.
    for arm in ("dense", "linear:global_impact@0.6"):
        main(["eval", *starts["eval"][0], "--arms", arm])

    def options(rng: random.Random, known_here: str) -> Iterator[str]:
        for _ in range(rng.randint(0, 3)):
            flag = rng.choice(known_here.split())
            yield flag
            if rng.random() < 0.95:
                value = rng.choice(known.get(flag, ()) if flag in known and rng.random() < 0.7 else values)
                # Whoever asks for a billion tokens gets them, one by one.
                yield value if flag != "--max-new-tokens" or len(value) < 3 or not value.isdigit() else "3"

    def make(rng: random.Random, folder: Path) -> Case:
        name = rng.choice((*starts, "flops", "generate", rng.choice(values)))
        start, flags = starts.get(name, ([], "--help --version"))
        shutil.copy(seeds / "results.json", folder)
        given = [*start, *options(rng, flags)] if rng.random() < 0.9 else [*options(rng, flags)]
        return call(name, *given)

    return make


@target
def mixed(seeds: Path) -> Target:
    """The short form: specs, indices, headers, arms, benches, each case one of them."""
    names = ("model_spec", "state_spaces_config", "shard_index", "safetensors", "arm", "bench_results", "tokenizer")
    makers = [TARGETS[name](seeds) for name in names]

    def make(rng: random.Random, folder: Path) -> Case:
        return rng.choice(makers)(rng, folder)

    return make
