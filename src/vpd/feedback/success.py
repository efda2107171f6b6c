"""Decides which rollouts have succeeded: by a threshold, or by comparison within their group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from vpd.types import Rollout


def successes(rollouts: Sequence[Rollout], threshold: float | None) -> list[bool]:
    """Tell for each rollout whether it has succeeded; one without a verdict has not.

    Args:
        rollouts: The rollouts.
        threshold: The reward from which a rollout succeeds. None compares it with its group: it succeeds where its
            reward is above the mean of the group's graded rollouts. In a group with equal rewards all have failed,
            since none of them shows how to do better.
    """
    if threshold is not None:
        return [rollout.verdict is not None and rollout.verdict.reward >= threshold for rollout in rollouts]
    rewards: dict[int, list[float]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.verdict is not None:
            rewards[rollout.group].append(rollout.verdict.reward)
    # The mean of equal numbers may be rounded to less than they are.
    means = {group: fmean(values) if min(values) < max(values) else max(values) for group, values in rewards.items()}
    return [rollout.verdict is not None and rollout.verdict.reward > means[rollout.group] for rollout in rollouts]
