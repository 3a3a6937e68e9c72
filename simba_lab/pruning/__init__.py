"""Token pruning: criteria score, keep schedules count, selection picks."""

from simba_lab.pruning.blocks import Blocks
from simba_lab.pruning.calibrated import Calibrated
from simba_lab.pruning.criteria import CRITERIA, Criterion
from simba_lab.pruning.impact import BandedImpact, OutputImpact, QueryImpact
from simba_lab.pruning.lookahead import LookaheadImpact
from simba_lab.pruning.plan import PruningPlan
from simba_lab.pruning.schedules import SCHEDULES, KeepSchedule, build_schedule
from simba_lab.pruning.select import select_index, select_mask
from simba_lab.pruning.signals import ScoredShape, Signals

__all__ = [
    "CRITERIA",
    "SCHEDULES",
    "BandedImpact",
    "Blocks",
    "Calibrated",
    "Criterion",
    "KeepSchedule",
    "LookaheadImpact",
    "OutputImpact",
    "PruningPlan",
    "QueryImpact",
    "ScoredShape",
    "Signals",
    "build_schedule",
    "select_index",
    "select_mask",
]
