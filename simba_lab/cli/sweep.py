"""``simba-lab sweep``: a comparison of arms at equal FLOPs, from nothing to a report."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from simba_lab.errors import InputError

EXAMPLES = """examples:
  simba-lab sweep --config sweeps/hierarchy_ablation.yaml
  simba-lab sweep --config sweeps/keep_curve.yaml --set search.trials=80
  simba-lab sweep --config sweeps/keep_curve.yaml --workers 4
  simba-lab sweep --config sweeps/keep_curve.yaml --workers 2 --gpus-per-worker 4
  simba-lab sweep --config sweeps/keep_curve.yaml --workers 8 --storage postgresql://lab@db.example.org/sweeps
The same command again continues: finished training and finished arms are never run twice.
With --storage, the same command on any number of hosts that share the folder works on one study.
SIGTERM saves what is being trained and ends with exit code 0.
Exit code 3: the arms cannot be brought to one budget; nothing has run then."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the sweep, a YAML file")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="overrule a value of the file, e.g. --set windows=100 or --set arms.0.experiment=FILE; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--workers", metavar="N", type=int, default=1,
        help="trials at once on this host: one GPU each, CPU threads divided (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--gpus-per-worker", metavar="K", type=int,
        help="GPUs of each worker, for experiments with trainer.devices K or auto (default: one, shared if need be)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="URL",
        help="a PostgreSQL database that several hosts work from; leave the password to PGPASSFILE",
    )  # fmt: skip
    parser.add_argument(
        "--heartbeat", metavar="SECONDS", type=int, default=20,
        help="with --storage: between two signs of life of a trial; three missing, and it is run again (default: 20)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.report import load_results, print_table, write_report
    from simba_lab.sweep import SharedStorage, read_sweep, run_sweep, stopped_by_sigterm
    from simba_lab.training.folder import disk_errors

    for name in ("workers", "heartbeat", "gpus_per_worker"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    config = read_sweep(args.config, args.overrides)
    storage = SharedStorage(args.storage, args.heartbeat) if args.storage else None
    with stopped_by_sigterm(), disk_errors():
        say = functools.partial(print, flush=True)
        path = run_sweep(args.config.stem, config, say, args.workers, storage, args.gpus_per_worker)
        results = load_results(path)
        print_table(results)
        page = write_report(path)
    print(f"results: {path}\nreport:  {page}")
    return json.loads(path.read_text(encoding="utf-8"))
