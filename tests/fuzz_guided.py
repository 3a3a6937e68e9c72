"""Our own parsers under atheris, which keeps the inputs that reach new branches and spoils those further.

``python tests/fuzz_guided.py PARSER RUNS SEEDS WORK``: the inputs begin as the sound files of SEEDS. What an input must
not do is what :class:`fuzzing.Judge` says; the first that does it is left in WORK as ``crash-*`` and ends the run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzzing import MEMORY, SCALARS, SECONDS, Judge, Tally, peak_memory

Parser = tuple[str, Callable[[Path], Any]]
"""Name of the file in which it gets its input, and what it does with the file."""


def _sweep(path: Path) -> None:
    from simba_lab.sweep import read_sweep

    read_sweep(path)


def _results(path: Path) -> None:
    from simba_lab.report.results import load_results

    load_results(path)


def _benchmark_results(path: Path) -> None:
    from simba_lab.evaluate.benchmarks.store import read_results

    read_results(path)


def _model_spec(path: Path) -> None:
    from simba_lab.checkpoint.spec import read_spec
    from simba_lab.checkpoint.weights import read_json

    read_spec(read_json(path), "model.json")


def _shard_index(path: Path) -> None:
    from simba_lab.checkpoint.weights import shard_names

    shard_names(path)


def _safetensors(path: Path) -> None:
    from simba_lab.checkpoint.weights import read_safetensors

    read_safetensors(path)


def _documents(path: Path) -> None:
    from simba_lab.data.sources import load_documents

    load_documents(str(path))


def _bench_results(path: Path) -> None:
    from simba_lab.bench.table import markdown, read

    markdown(read([path]))


def _arm(path: Path) -> None:
    from simba_lab.evaluate.arms import parse_arm
    from simba_lab.model import LanguageModel, ModelConfig

    parse_arm(path.read_text(encoding="utf-8", errors="replace"), LanguageModel(ModelConfig(8, 2, 9), seed=None))


def _answers(path: Path) -> None:
    from simba_lab.evaluate.answers import AnswerBook

    AnswerBook(path)


PARSERS: dict[str, Parser] = {
    "answers": ("answers.jsonl", _answers), "arm": ("arm.txt", _arm), "bench_results": ("bench.json", _bench_results),
    "benchmark_results": ("benchmarks.json", _benchmark_results), "documents": ("text.jsonl", _documents),
    "model_spec": ("model.json", _model_spec), "results": ("results.json", _results),
    "safetensors": ("model.safetensors", _safetensors), "shard_index": ("index.json", _shard_index),
    "sweep": ("sweep.yaml", _sweep),
}  # fmt: skip
SAID = (r"^Done (\d+) runs", r"^slowest so far: ([\d.]+) s", r"^peak so far: (\d+) bytes")
"""What a run says about itself, the first in libFuzzer's words."""
WHERE = {"model_spec": "run/model.json"}


def _sound(name: str, seeds: Path) -> bytes:
    """The input of a parser that the others grow from; small, since the time goes into what is spoilt."""
    import torch
    from fuzz_targets import BENCH, benchmark_record
    from safetensors.torch import save

    if name == "benchmark_results":
        return json.dumps(benchmark_record()).encode()
    if name == "bench_results":
        tree = json.loads(BENCH.read_text())
        return json.dumps(tree | {"lines": tree["lines"][:2]}).encode()
    if name == "safetensors":
        return save({"weight": torch.ones(2, 3), "bias": torch.ones(3)})
    made = {
        "answers": b'["0f", [-1.5, true]]\n["1e", "text"]\n', "arm": b"linear:norm@0.6",
        "documents": b'{"title": "a", "text": "b"}\n{"title": "c", "text": "d"}\n',
        "shard_index": b'{"metadata": {"total_size": 1}, "weight_map": {"w": "a.safetensors"}}',
    }  # fmt: skip
    return made[name] if name in made else (seeds / WHERE.get(name, PARSERS[name][0])).read_bytes()


def _dictionary(sound: bytes) -> str:
    """What libFuzzer may put in as a whole: the words of the sound input, and values that are hard to get right."""
    words = {*re.findall(rb"[A-Za-z_][\w.]+", sound), *(json.dumps(value).encode() for value in SCALARS)}
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in sorted(words) if len(word) < 64)
    return "".join(f'"{word}"\n' for word in escaped)


def run_guided(name: str, runs: int, seeds: Path, work: Path) -> Tally:
    """Inputs that were tried, in a process of its own; AssertionError with what the judge said if one failed."""
    command = [sys.executable, __file__, name, str(runs), str(seeds), str(work)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    assert child.returncode == 0, child.stderr[-2000:]
    runs, seconds, memory = (re.findall(pattern, child.stderr, re.MULTILINE)[-1] for pattern in SAID)
    return Tally(int(runs), float(seconds), int(memory))


def main(name: str, runs: str, seeds: str, work: str) -> None:
    import atheris

    folder, corpus = Path(work) / "inner" / "case", Path(work) / "corpus"
    for place in (folder, corpus):
        place.mkdir(parents=True, exist_ok=True)
    (file, parse), judge = PARSERS[name], Judge(folder)
    with atheris.instrument_imports(include=["simba_lab", "yaml"]):
        from fuzz_targets import quiet

        sound = _sound(name, Path(seeds))
        (folder / file).write_bytes(sound)
        parse(folder / file)
    (corpus / "sound").write_bytes(sound)
    (Path(work) / "words").write_text(_dictionary(sound), encoding="utf-8")
    slowest, peak = 0.0, 0

    def one(content: bytes) -> None:
        nonlocal slowest, peak
        (folder / file).write_bytes(content)
        began = time.process_time()
        verdict = judge.verdict(quiet(parse, folder / file))
        took, held = time.process_time() - began, peak_memory()
        if took > slowest or held > peak:
            slowest, peak = max(took, slowest), held
            print(f"slowest so far: {slowest:.4f} s\npeak so far: {peak} bytes", file=sys.stderr, flush=True)
        if verdict:
            raise AssertionError(" in ".join(verdict))

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    limits = [f"-timeout={2 * SECONDS:.0f}", f"-rss_limit_mb={(resident + MEMORY) >> 20}", "-max_len=20000", "-seed=1"]
    limits.append(f"-dict={work}/words")
    atheris.Setup([__file__, f"-runs={runs}", *limits, f"-artifact_prefix={work}/", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
