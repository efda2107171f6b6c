"""Advantage reshaping: A_t = w_rl A_GRPO + w_opd stopgrad(log q(y_t) - log pi(y_t)), in GRPO's clipped objective.

A baseline of VPD (arXiv 2605.15113). A rollout without feedback keeps its GRPO term.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpd.algorithms.example import Example
from vpd.algorithms.m_step import MStepResult
from vpd.algorithms.policy_step import group_advantages, policy_step
from vpd.config import Reshape
from vpd.policy.learner import Learner
from vpd.timing import Timer


def update(
    learner: Learner, examples: Sequence[Example], settings: Reshape, batch_prompts: int, timer: Timer
) -> MStepResult:
    """One iteration's update."""

    def shape(advantages: Tensor, lead: Tensor) -> Tensor:
        return settings.reward_weight * advantages + settings.distillation_weight * lead

    with timer("m_step"):
        advantages = group_advantages(examples, settings.scale_rewards)
        return policy_step(learner, examples, settings, batch_prompts, advantages, shape=shape)
