"""What the harness reads: a YAML file for each task or group, JSON lines for its documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from simba_lab.files import writing


class Function(str):
    """A dotted name that the harness imports: ``!function module.name`` in its YAML."""


class _Dumper(yaml.SafeDumper):
    """The safe dumper, with functions."""


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_task(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    metadata: dict[str, Any],
    data: Path,
    split: str = "test",
) -> None:
    """Write ``NAME.yaml``, a task over the JSON lines of ``data``, which it names by absolute path.

    Args:
        folder: where to write.
        name: of the task.
        settings: the harness's keys for prompts, targets and metrics.
        metadata: goes into every result file; a ``version`` is added unless it has one.
        data: the file of documents.
        split: what the harness calls them.
    """
    head = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {split: str(data.resolve())}}}
    _write_yaml(folder / f"{name}.yaml", head | {f"{split}_split": split} | settings, metadata)


def write_group(folder: Path, name: str, tasks: Sequence[str], means: Sequence[str], metadata: dict[str, Any]) -> None:
    """Write ``NAME.yaml``, a group of ``tasks`` with the plain mean over them of each metric in ``means``."""
    metrics = [{"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in means]
    group = {"group": name, "task": list(tasks), "aggregate_metric_list": metrics}
    _write_yaml(folder / f"{name}.yaml", group, metadata)


def write_documents(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    with writing(path) as partial:
        partial.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def remove_tasks(folder: Path, family: str) -> None:
    """Delete what an earlier build, maybe of other lengths or distances, has left of a family of tasks."""
    for suffix in ("yaml", "jsonl"):
        for file in (*folder.glob(f"{family}.{suffix}"), *folder.glob(f"{family}_*.{suffix}")):
            file.unlink()


def mean_metric(name: str, higher_is_better: bool = True) -> dict[str, Any]:
    """A metric of the harness that is averaged over documents."""
    return {"metric": name, "aggregation": "mean", "higher_is_better": higher_is_better}


def _write_yaml(path: Path, content: dict[str, Any], metadata: dict[str, Any]) -> None:
    with writing(path) as partial:
        text = yaml.dump(
            content | {"metadata": {"version": 1.0} | metadata}, Dumper=_Dumper, sort_keys=False, width=120
        )
        partial.write_text(text, encoding="utf-8")
