"""Comparisons of arms at one budget, planned, run, continued and written down."""

from simba_lab.sweep.config import SweepConfig, read_sweep
from simba_lab.sweep.run import RESULTS_FILE, run_sweep

__all__ = ["RESULTS_FILE", "SweepConfig", "read_sweep", "run_sweep"]
