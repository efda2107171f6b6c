"""The joint loss: w_opd L_SDPO + w_rl L_GRPO, a baseline of VPD (arXiv 2605.15113).

The distillation is a mean over the tokens with a teacher, GRPO's term one over all graded rollouts' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from vpd.algorithms.example import Example
from vpd.algorithms.m_step import MStepResult
from vpd.algorithms.policy_step import group_advantages, policy_step
from vpd.config import Joint
from vpd.policy.learner import Learner
from vpd.timing import Timer


def update(
    learner: Learner, examples: Sequence[Example], settings: Joint, batch_prompts: int, timer: Timer
) -> MStepResult:
    """One iteration's update."""
    with timer("m_step"):
        advantages = group_advantages(examples, settings.scale_rewards)
        distillation = (settings.reward_weight, settings.distillation_weight, settings)
        return policy_step(learner, examples, settings, batch_prompts, advantages, distillation=distillation)
