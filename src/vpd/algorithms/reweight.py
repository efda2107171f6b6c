"""Advantage reweighting: w_t = exp(sign(A) D_t), A_t = A ((1 - a) + a clip(w_t, 1 - eps, 1 + eps)), with
D_t = stopgrad(log q(y_t) - log pi(y_t)); a decays over training.

A baseline of VPD (arXiv 2605.15113), which states neither eps nor the schedule: here a falls linearly. A token
without a teacher has weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vpd.algorithms.example import Example
from vpd.algorithms.m_step import MStepResult
from vpd.algorithms.policy_step import group_advantages, policy_step
from vpd.config import Reweight
from vpd.policy.learner import Learner
from vpd.timing import Timer


def mixing(settings: Reweight, step: int) -> float:
    """a in rollout batch ``step``, counted from 1."""
    return settings.mixing * max(0.0, 1.0 - (step - 1) / settings.mixing_steps)


def update(
    learner: Learner, examples: Sequence[Example], settings: Reweight, step: int, batch_prompts: int, timer: Timer
) -> MStepResult:
    """One iteration's update."""
    share, epsilon = mixing(settings, step), settings.weight_epsilon

    def shape(advantages: Tensor, lead: Tensor) -> Tensor:
        weights = (advantages.sign() * lead).exp().clamp(1.0 - epsilon, 1.0 + epsilon)
        return advantages * ((1.0 - share) + share * weights)

    with timer("m_step"):
        advantages = group_advantages(examples, settings.scale_rewards)
        return policy_step(learner, examples, settings, batch_prompts, advantages, shape=shape)
