"""What is committed of finished sweeps and runs: experiments/results/*.json, one line for each, from runs/.

    .venv/bin/python experiments/collect.py [FOLDER]      # sweeps/, ladder/, flow- and tasks-*.json; of runs by default

Sweeps are sorted into files by the first word of their folders' names (pair-12m-1024 into pairs.json); what
`simba-lab inspect --flow --json FOLDER/flow-NAME.json` measured goes to highways.json, and what `simba-lab eval --tasks
--json FOLDER/tasks-NAME.json` did to tasks.json, without the scores of single documents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FILES = {
    "pair": "pairs", "curve": "curve", "tuned": "tuned", "from_scratch": "from_scratch", "search": "search",
    "recall": "recall", "shorter": "shorter", "transfer": "transfer",
    "lookahead": "lookahead", "retrained": "retrained",
}  # fmt: skip
OF_SWEEP = (
    "created command budget_flops tolerance budget_reference metric protocol n_context n_suffix far_distance windows "
    "documents far_tokens statistics environment"
).split()
OF_ARM = (
    "name kind criterion schedule matched flops mean_keep final_keep quality quality_interval difference "
    "difference_interval p_value quality_far quality_far_interval difference_far difference_far_interval p_value_far "
    "answered"
).split()
OF_CONFIG = ("experiment", "split", "windows", "n_context", "dtype", "device", "recall", "search")


def rounded(value: Any, digits: int = 6) -> Any:
    """Numbers to so many digits, in lists and dictionaries too."""
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def sweep(path: Path) -> dict[str, Any]:
    """A results.json without what only its page needs."""
    results = json.loads(path.read_text())
    config = results["config"]
    smaller = next((arm["experiment"] for arm in config["arms"] if arm["kind"] == "smaller_dense"), None)
    kept = chosen(results, OF_SWEEP) | {"config": chosen(config, OF_CONFIG) | {"smaller": smaller}}
    kept["arms"] = rounded([chosen(arm, OF_ARM) for arm in results["arms"]])
    if "search" in results:
        search = results["search"]
        best = next(trial for trial in search["trials"] if trial["number"] == search["best"])
        kept["search"] = {"trials": len(search["trials"]), **chosen(search, ("windows", "split"))}
        kept["search"]["best"] = chosen(best, ("number", "value", "knots", "keep_counts"))
    return kept


def run(folder: Path) -> dict[str, Any]:
    """A run's record with its last validation and test."""
    record = json.loads((folder / "run.json").read_text())
    record.pop("training_flops_by_op", None)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        record |= {key: rounded(value) for key, value in row.items() if key.startswith(("val/", "test/"))}
    return record


def highways(path: Path) -> dict[str, Any]:
    """Redundancy, flow and path length by layer, to four digits, with what they were measured on."""
    seen = json.loads(path.read_text())
    kept = chosen(seen, ("command", "checkpoint", "source", "n_layer", "layer", "environment"))
    measured = {**seen["highways"]}
    for name in ("arms", "loss_rise"):
        measured[name] = rounded(measured[name], 4)
    return kept | measured


def tasks(path: Path) -> dict[str, Any]:
    """Scores of the benchmarks and their paired differences, to four digits."""
    seen = json.loads(path.read_text())
    kept = chosen(seen, ("command", "checkpoint", "limit", "line_width", "environment"))
    return kept | rounded(chosen(seen["comparison"], ("documents", "values", "other_metrics", "differences")), 4)


def chosen(values: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if values.get(key) is not None}


def write(name: str, items: Mapping[str, Any]) -> None:
    """Adds to what the file holds: a machine that is gone cannot be asked again."""
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted((held | dict(items)).items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {len(lines)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"))
    folder = parser.parse_args().folder
    sweeps = sorted((folder / "sweeps").glob("*/results.json"))
    for first, name in FILES.items():
        found = {path.parent.name: sweep(path) for path in sweeps if path.parent.name.startswith(f"{first}-")}
        if found:
            write(name, found)
    for first, name, read in (("flow", "highways", highways), ("tasks", "tasks", tasks)):
        paths = sorted(folder.glob(f"{first}-*.json"))
        if paths:
            write(name, {path.stem: read(path) for path in paths})
    records = sorted((folder / "ladder").glob("*/run.json"))
    if records:
        write("runs", {path.parent.name: run(path.parent) for path in records})


if __name__ == "__main__":
    main()
