"""``simba-lab report``: the tables and the page of sweeps that have run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  simba-lab report runs/sweeps/hierarchy_ablation
  simba-lab report runs/sweeps/hierarchy_ablation runs/sweeps/keep_curve --out both.html
  simba-lab report runs/sweeps/context_480 runs/sweeps/context_960 --allow-unequal
The page is one file that needs no network. A folder that is incomplete or from another version is left out, and the
page says why. It stays under 3 MB: of many arms it draws the first, the best, the controls and those of the lowest NLL,
and lists fewer only if it must; it says so. Exit code 3: arms or sweeps cost different FLOPs and --allow-unequal was
not given."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="+",
        help="folder of a sweep, or its results.json; the first that can be read sets the budget",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page; default: report.html in the folder, or above all of them"
    )
    parser.add_argument(
        "--allow-unequal", action="store_true", help="show arms of another budget in a section of that name"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.budget import check_evidence
    from simba_lab.report import load_results, print_table
    from simba_lab.report.folders import RESULTS_FILE, gather
    from simba_lab.report.html import default_target, write_page

    target = args.out or default_target(args.folders)
    gathered = gather(args.folders, target, args.allow_unequal)
    shown = {one.folder for one in [*gathered.comparisons, *gathered.unequal]}
    for path in args.folders:
        file = path / RESULTS_FILE if path.is_dir() else path
        if file.parent in shown:
            check_evidence(file, load_results(file, allow_unequal=True))
    write_page(gathered, target)
    for one in [*gathered.comparisons, *gathered.unequal]:
        print_table(one.results)
    for one in gathered.skipped:
        print(f"left out: {one.path}: {one.reason}")
    print(f"report: {target}")
    conclusions = {one.results["name"]: dict(one.results["conclusion"]) for one in gathered.comparisons}
    return {
        "report": str(target),
        "conclusion": next(iter(conclusions.values())),
        "conclusions": conclusions,
        "unequal": [one.results["name"] for one in gathered.unequal],
        "left_out": {one.path: one.reason for one in gathered.skipped},
    }
