"""``simba-lab sweep``: a comparison of arms at equal FLOPs, from nothing to a report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  simba-lab sweep --config sweeps/hierarchy_ablation.yaml
  simba-lab sweep --config sweeps/keep_curve.yaml --set search.trials=80
The same command again continues: finished training and finished arms are never run twice.
Exit code 3: the arms cannot be brought to one budget; nothing has run then."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the sweep, a YAML file")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="overrule a value of the file, e.g. --set windows=100; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.report import load_results, print_table, write_report
    from simba_lab.sweep import read_sweep, run_sweep

    config = read_sweep(args.config, args.overrides)
    path = run_sweep(args.config.stem, config, lambda line: print(line, flush=True))
    results = load_results(path)
    print_table(results)
    page = write_report(path)
    print(f"results: {path}\nreport:  {page}")
    return json.loads(path.read_text(encoding="utf-8"))
