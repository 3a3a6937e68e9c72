"""``simba-lab report``: the table and the page of a sweep that has run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  simba-lab report runs/sweeps/hierarchy_ablation"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("folder", type=Path, help="folder of a sweep, or its results.json")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.report import load_results, print_table, write_report

    path = args.folder / "results.json" if args.folder.is_dir() else args.folder
    results = load_results(path)
    page = write_report(path)
    print_table(results)
    print(f"report: {page}")
    return {"report": str(page), "conclusion": dict(results["conclusion"])}
