"""Comparisons of arms at one budget, planned, run, continued and written down."""

from simba_lab.sweep.config import SweepConfig, read_sweep
from simba_lab.sweep.run import RESULTS_FILE, run_sweep
from simba_lab.sweep.stopping import stopped_by_sigterm
from simba_lab.sweep.study import SharedStorage

__all__ = ["RESULTS_FILE", "SharedStorage", "SweepConfig", "read_sweep", "run_sweep", "stopped_by_sigterm"]
