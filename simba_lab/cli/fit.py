"""``simba-lab fit|validate|test|predict``: Lightning's own command line over our module and data."""

from __future__ import annotations

from collections.abc import Sequence

from simba_lab.training.lightning_cli import run_cli


def main(argv: Sequence[str]) -> int:
    """Run one subcommand; ``argv`` begins with its name. Raises InputError for a wrong key or value."""
    run_cli(argv)
    return 0
