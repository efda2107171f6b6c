"""Group relative policy optimisation: each rollout's reward against its group's mean, clipped ratios, no teacher.

The reward is centred and by default not scaled, tokens are averaged over the minibatch, and there is no penalty for
leaving the initial model: the settings of VPD's baselines (arXiv 2605.15113).
"""

from __future__ import annotations

from collections.abc import Sequence

from vpd.algorithms.example import Example
from vpd.algorithms.m_step import MStepResult
from vpd.algorithms.policy_step import group_advantages, policy_step
from vpd.config import GRPO
from vpd.policy.learner import Learner
from vpd.timing import Timer


def update(
    learner: Learner, examples: Sequence[Example], settings: GRPO, batch_prompts: int, timer: Timer
) -> MStepResult:
    """One iteration's update."""
    with timer("m_step"):
        advantages = group_advantages(examples, settings.scale_rewards)
        return policy_step(learner, examples, settings, batch_prompts, advantages)
