"""Advantage reshaping: A_t = w_rl A_GRPO + w_opd stopgrad(log q(y_t) - log pi(y_t)), in GRPO's clipped objective.

It is a baseline of VPD (arXiv 2605.15113). A rollout without feedback keeps its GRPO term.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from vpd.algorithms.base import ExampleBatch, UpdateResult
from vpd.algorithms.policy_step import PolicyGradientAlgorithm, group_advantages, policy_step
from vpd.config import PolicyGradientSettings
from vpd.policy.learner import Learner


class ReshapeSettings(PolicyGradientSettings):
    """GRPO with log q - log pi of each token added to its advantage."""

    type: Literal["reshape"] = "reshape"  # pyright: ignore[reportIncompatibleVariableOverride]
    distillation_weight: float = Field(default=1.0, ge=0)
    """The weight of the log-ratio."""
    reward_weight: float = Field(default=1.0, ge=0)
    """The weight of GRPO's advantage."""


class Reshape(PolicyGradientAlgorithm[ReshapeSettings]):
    """The policy gradient with advantages that the teacher's log-ratio is added to."""

    settings_class = ReshapeSettings
    reads_feedback = True
    follows_teacher = True

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        settings = self.settings

        def shaping(advantages: Tensor, log_ratio: Tensor) -> Tensor:
            return settings.reward_weight * advantages + settings.distillation_weight * log_ratio

        advantages = group_advantages(batch.examples, settings.scale_rewards)
        return policy_step(learner, batch, settings, advantages, shaping=shaping)
