"""Describes a batch of rollouts in numbers, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from vpd.types import Rollout, TeacherView


def batch_statistics(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    views: Sequence[TeacherView | None],
    total: Callable[..., list[float]],
    largest: Callable[[float], float],
) -> dict[str, float | None]:
    """Compute the rewards, activity, lengths and repetition of a batch.

    Args:
        rollouts: The B rollouts of this process, those of one group next to each other.
        is_success: Whether each rollout has succeeded.
        views: The teacher's prompts for each rollout; None where it has no feedback.
        total: Sums each of several numbers over processes.
        largest: Takes the largest of a number over processes.

    Returns:
        The metrics by name; None where there is nothing to average.
    """
    graded = [index for index, rollout in enumerate(rollouts) if rollout.verdict is not None]
    groups = [[is_success[i] for i in group] for _, group in groupby(graded, key=lambda i: rollouts[i].group)]
    rewards = [verdict.reward for i in graded if (verdict := rollouts[i].verdict) is not None]
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    count, graded_count, reward, successes, active, length, truncated, repetition = total(
        len(rollouts),
        len(graded),
        sum(rewards),
        sum(is_success[i] for i in graded),
        sum(view is not None for view in views),
        sum(lengths),
        sum(rollout.truncated for rollout in rollouts),
        sum(repeated_share(rollout.completion_ids) for rollout in rollouts),
    )
    group_count, all_success, all_failure, lone_success = total(
        len(groups),
        sum(all(group) for group in groups),
        sum(not any(group) for group in groups),
        sum(sum(group) == 1 for group in groups),
    )
    return {
        "reward": reward / graded_count if graded_count else None,
        "reward_min": -largest(-min(rewards, default=math.inf)) if graded_count else None,
        "reward_max": largest(max(rewards, default=-math.inf)) if graded_count else None,
        "success_rate": successes / graded_count if graded_count else None,
        "active_share": active / count,
        "without_feedback": graded_count - active,
        "ungraded": count - graded_count,
        "all_success_groups": all_success / group_count if group_count else None,
        "all_failure_groups": all_failure / group_count if group_count else None,
        "lone_success_groups": lone_success / group_count if group_count else None,
        "length_mean": length / count,
        "length_max": largest(max(lengths, default=0)),
        "truncated_share": truncated / count,
        "repetition": repetition / count,
    }


def reward_statistics(
    rollouts: Sequence[Rollout],
    total: Callable[..., list[float]],
    union: Callable[[Iterable[str]], list[str]],
) -> dict[str, float]:
    """Compute each reward function's mean and standard deviation, and the means of what the functions log.

    Args:
        rollouts: The rollouts of this process. Verdicts of reward functions, and those of tasksets of verifiers, hold
            ``rewards`` and ``metrics`` by name among their details.
        total: Sums each of several numbers over processes.
        union: Collects the names that any of the processes has.

    Returns:
        ``rewards/NAME/mean`` and ``rewards/NAME/std`` for each function that graded anything, as in TRL, where the
        deviation is that of a sample; and the logged metrics by their names.
    """
    details = [rollout.verdict.details for rollout in rollouts if rollout.verdict is not None]
    rewards, metrics = _by_name(details, "rewards"), _by_name(details, "metrics")
    statistics = {}
    for name in union(rewards):
        values = rewards.get(name, [])
        count, summed = total(len(values), math.fsum(values))
        mean = summed / count
        (squares,) = total(math.fsum((value - mean) ** 2 for value in values))
        statistics[f"rewards/{name}/mean"] = mean
        statistics[f"rewards/{name}/std"] = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
    for name in union(metrics):
        count, summed = total(len(metrics.get(name, [])), math.fsum(metrics.get(name, [])))
        statistics[name] = summed / count
    return statistics


def _by_name(details: Iterable[Mapping[str, Any]], kind: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for of_rollout in details:
        found = of_rollout.get(kind)
        for name, value in found.items() if isinstance(found, Mapping) else ():
            if isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    return values


def repeated_share(token_ids: Sequence[int]) -> float:
    """Compute the share of a completion's 3-grams that have occurred before in it, in [0, 1)."""
    trigrams = list(zip(token_ids, token_ids[1:], token_ids[2:], strict=False))
    return 1.0 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
