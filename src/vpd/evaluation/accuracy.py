"""Measures accuracy on a set of tasks, averaged over k completions of each (avg@k)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from accelerate.utils import gather_object

from vpd.config import EvalSettings
from vpd.evaluation.intervals import bootstrap_interval, wilson_interval
from vpd.rollout import RolloutSampler
from vpd.types import Task


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy over a set of tasks.

    Attributes:
        accuracy: The share of successes among a task's k completions, averaged over tasks, in [0, 1].
        low: The lower end of the 95% interval: Wilson's where k = 1, else a bootstrap over tasks.
        high: The upper end of that interval.
        reward: The mean reward of a task's k completions, averaged over tasks.
        n: How many tasks were graded.
        ungraded: How many tasks have no completion that could be graded; they are left out.
        seconds: The wall-clock seconds of sampling and judging.
        outcomes: The share of successes by task id, for paired comparisons.
        judge_error: What the judge failed with on this process, the last time; None where it did not fail.
    """

    accuracy: float
    low: float
    high: float
    reward: float
    n: int
    ungraded: int
    seconds: float
    outcomes: dict[str, float]
    judge_error: str | None = None

    def summary(self) -> dict[str, float | int]:
        """Return all numbers but the outcomes of single tasks."""
        return {name: getattr(self, name) for name in ("accuracy", "low", "high", "reward", "n", "ungraded", "seconds")}


def evaluate(
    sampler: RolloutSampler,
    tasks: Sequence[Task],
    settings: EvalSettings,
    success_threshold: float,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> Evaluation:
    """Sample ``settings.k`` completions for each task, judge them, and average.

    Args:
        sampler: Samples completions and has them judged.
        tasks: All tasks; each process answers its part, and all processes get the whole result.
        settings: The settings of the number of completions k, the temperature, top-p, top-k and min-p.
        success_threshold: The reward from which a completion succeeds.
        seed: The seed of the draws; each process adds its number.
        process: The number of this process.
        processes: How many processes there are.
    """
    start = time.perf_counter()
    mine = list(tasks[process::processes])
    cut = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    sampled = sampler.sample(mine, settings.k, seed=seed + process, cut=cut)
    own: dict[str, list[float]] = {task.id: [] for task in mine}
    for rollout in sampled.rollouts:
        if rollout.verdict is not None:
            own[rollout.task.id].append(rollout.verdict.reward)
    gathered: list[tuple[str, list[float]]] = gather_object(list(own.items())) if processes > 1 else list(own.items())
    graded = {id: rewards for id, rewards in gathered if rewards}
    outcomes = {id: fmean(reward >= success_threshold for reward in rewards) for id, rewards in graded.items()}
    shares = list(outcomes.values())
    interval = wilson_interval(sum(shares), len(shares)) if settings.k == 1 else bootstrap_interval(shares)
    return Evaluation(
        accuracy=sum(shares) / len(shares) if shares else float("nan"),
        low=interval[0],
        high=interval[1],
        reward=fmean(fmean(rewards) for rewards in graded.values()) if graded else float("nan"),
        n=len(shares),
        ungraded=len(gathered) - len(shares),
        seconds=time.perf_counter() - start,
        outcomes=outcomes,
        judge_error=sampled.judge_errors[-1] if sampled.judge_errors else None,
    )
