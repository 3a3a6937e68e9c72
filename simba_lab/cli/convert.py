"""``simba-lab convert``: a model from one format into another, every bit of its weights kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  simba-lab convert state-spaces/mamba-130m runs/mamba-130m --format run
  simba-lab convert runs/base exported --format transformers --dtype bf16
  simba-lab convert runs/ladder/7m experiments/shipped/7m --format run --dtype bf16 --card
  simba-lab convert runs/base/checkpoints/last.ckpt exported --format state-spaces
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``convert``."""
    from simba_lab.checkpoint import FORMATS
    from simba_lab.checkpoint.weights import DTYPES

    parser.description = (
        "Reads run folders, .ckpt files, state-spaces and transformers folders (Mamba and Mamba-2) and names on the "
        "hub; writes a new folder, whole or not at all. A tokenizer.json beside the source goes along, and with "
        "--format run the run's record: config.yaml, run.json, metrics.jsonl."
    )
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="folder, .ckpt file or name on the hub")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--format", choices=FORMATS, required=True, help="format of TARGET")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (that of SOURCE)")
    parser.add_argument("--card", action="store_true", help="add README.md, a model card made from the run's record")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert and print what was written."""
    from simba_lab.checkpoint import convert

    done = convert(args.source, args.target, args.format, args.dtype, args.card)
    print(f"{done['target']}: {', '.join(done['files'])}")
    print(f"{done['parameters']:,} parameters in {' and '.join(done['dtypes'])}, format {done['format']}")
    for remark in done["remarks"]:
        print(f"note: {remark}")
    return done
