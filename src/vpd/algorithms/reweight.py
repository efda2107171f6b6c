"""Advantage reweighting: w_t = exp(sign(A) D_t), A_t = A ((1 - a) + a clip(w_t, 1 - eps, 1 + eps)), with
D_t = stopgrad(log q(y_t) - log pi(y_t)); a decays over training.

It is a baseline of VPD (arXiv 2605.15113), which states neither eps nor the schedule: here a falls linearly. A token
without a teacher has weight 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from vpd.algorithms.base import ExampleBatch, UpdateResult
from vpd.algorithms.policy_step import PolicyGradientAlgorithm, group_advantages, policy_step
from vpd.config import PolicyGradientSettings
from vpd.policy.learner import Learner


class ReweightSettings(PolicyGradientSettings):
    """GRPO whose advantages weigh more at tokens where the teacher agrees with their sign."""

    type: Literal["reweight"] = "reweight"  # pyright: ignore[reportIncompatibleVariableOverride]
    weight_epsilon: float = Field(default=0.2, ge=0, lt=1)
    """A token's weight stays between 1 - weight_epsilon and 1 + weight_epsilon."""
    mixing: float = Field(default=1.0, ge=0, le=1)
    """The share of the weighted advantage in the first batch; it falls linearly."""
    mixing_steps: int = Field(default=100, ge=1)
    """The number of rollout batches until that share is zero."""


def mixing(settings: ReweightSettings, step: int) -> float:
    """Return a in rollout batch ``step``, counted from 1."""
    return settings.mixing * max(0.0, 1.0 - (step - 1) / settings.mixing_steps)


class Reweight(PolicyGradientAlgorithm[ReweightSettings]):
    """The policy gradient with advantages that the teacher's agreement weighs."""

    settings_class = ReweightSettings
    reads_feedback = True
    follows_teacher = True

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        share, epsilon = mixing(self.settings, batch.step), self.settings.weight_epsilon

        def shaping(advantages: Tensor, log_ratio: Tensor) -> Tensor:
            weights = (advantages.sign() * log_ratio).exp().clamp(1.0 - epsilon, 1.0 + epsilon)
            return advantages * ((1.0 - share) + share * weights)

        advantages = group_advantages(batch.examples, self.settings.scale_rewards)
        return policy_step(learner, batch, self.settings, advantages, shaping=shaping)
