"""Measures how good a policy is: accuracy with intervals, and the gap between teacher and student."""

from vpd.evaluation.accuracy import Evaluation, evaluate
from vpd.evaluation.evaluator import Evaluator
from vpd.evaluation.gap import Gap, measure_gap
from vpd.evaluation.intervals import bootstrap_interval, crossed_interval, wilson_interval
from vpd.evaluation.standalone import evaluate_standalone
from vpd.evaluation.statistics import batch_statistics, reward_statistics

__all__ = [
    "Evaluation",
    "Evaluator",
    "Gap",
    "batch_statistics",
    "bootstrap_interval",
    "crossed_interval",
    "evaluate",
    "evaluate_standalone",
    "measure_gap",
    "reward_statistics",
    "wilson_interval",
]
