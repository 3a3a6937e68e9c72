"""Compute as a budget: the counter that checks the closed form, and the solver that makes arms cost the same."""

from simba_lab.budget.accounting import Account, account
from simba_lab.budget.arms import Arm, DenseArm, PrunedArm, ShorterContextArm, TrainedArm
from simba_lab.budget.count import CostMismatch, count_forward, refuse_altered, verify
from simba_lab.budget.evidence import check_evidence, seal
from simba_lab.budget.match import Budget, Solution, check_realised, closest, match, solve
from simba_lab.budget.operations import UncountedOperation

__all__ = [
    "Account",
    "Arm",
    "Budget",
    "CostMismatch",
    "DenseArm",
    "PrunedArm",
    "ShorterContextArm",
    "Solution",
    "TrainedArm",
    "UncountedOperation",
    "account",
    "check_evidence",
    "check_realised",
    "closest",
    "count_forward",
    "match",
    "refuse_altered",
    "seal",
    "solve",
    "verify",
]
