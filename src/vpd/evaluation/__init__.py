"""How good a policy is: accuracy with intervals, and how far the teacher is ahead of the student."""

from vpd.evaluation.accuracy import Evaluation, evaluate
from vpd.evaluation.evaluator import Evaluator
from vpd.evaluation.gap import Gap, measure_gap
from vpd.evaluation.intervals import bootstrap_interval, crossed_interval, wilson_interval

__all__ = [
    "Evaluation",
    "Evaluator",
    "Gap",
    "bootstrap_interval",
    "crossed_interval",
    "evaluate",
    "measure_gap",
    "wilson_interval",
]
