"""Training through Lightning: the module, what a run records, its progress."""

from simba_lab.training.experiment import Experiment, read_experiment
from simba_lab.training.lightning_cli import CONFIG_FILE
from simba_lab.training.module import LanguageModeling, PrunedTraining
from simba_lab.training.progress import Throughput, progress_callback
from simba_lab.training.record import METRICS_FILE, RUN_FILE, MetricsFile, RunCheckpoint, RunRecord

__all__ = [
    "CONFIG_FILE",
    "Experiment",
    "METRICS_FILE",
    "RUN_FILE",
    "LanguageModeling",
    "MetricsFile",
    "PrunedTraining",
    "RunCheckpoint",
    "RunRecord",
    "Throughput",
    "progress_callback",
    "read_experiment",
]
