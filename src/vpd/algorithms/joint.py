"""The joint loss: w_opd L_SDPO + w_rl L_GRPO, a baseline of VPD (arXiv 2605.15113).

The distillation is a mean over the tokens with a teacher, GRPO's term one over all graded rollouts' tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from vpd.algorithms.base import ExampleBatch, Passes, UpdateResult
from vpd.algorithms.distillation import check_sampling
from vpd.algorithms.policy_step import Distillation, PolicyGradientAlgorithm, group_advantages, policy_step
from vpd.algorithms.teacher import make_teacher
from vpd.config import MStepSettings, PolicyGradientSettings, bounded_importance
from vpd.policy.learner import Learner

if TYPE_CHECKING:
    from vpd.config import VPDConfig


class JointSettings(PolicyGradientSettings, MStepSettings):
    """The sum of the distillation loss and GRPO's."""

    type: Literal["joint"] = "joint"  # pyright: ignore[reportIncompatibleVariableOverride]
    distillation_weight: float = Field(default=1.0, ge=0)
    """The weight of the distillation loss."""
    reward_weight: float = Field(default=1.0, ge=0)
    """The weight of GRPO's loss."""
    importance_clip: float | None = Field(default_factory=bounded_importance, ge=0)
    """The bound on the weights of the distillation's tokens, as in SDPO."""

    @model_validator(mode="after")
    def _teacher(self) -> JointSettings:
        if self.teacher == "frozen":
            raise ValueError('algorithm.teacher = "frozen" is not offered with joint: take "live" or "ema"')
        return self


class Joint(PolicyGradientAlgorithm[JointSettings]):
    """Both losses in one pass over the student's sequences."""

    settings_class = JointSettings
    reads_feedback = True
    follows_teacher = True

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        settings = self.settings
        advantages = group_advantages(batch.examples, settings.scale_rewards)
        distillation = Distillation(settings.reward_weight, settings.distillation_weight, settings)
        return policy_step(learner, batch, settings, advantages, distillation=distillation)

    def check(self, config: VPDConfig) -> None:
        super().check(config)
        check_sampling(self.settings, config)

    def weight_copies(self) -> Mapping[str, float]:
        """Ask for the initial model, where its penalty needs it, and for what the teacher needs."""
        return {**super().weight_copies(), **make_teacher(self.settings).copies}

    def matched_layers(self) -> Sequence[int]:
        return self.settings.representation_layers or ()

    def passes(self, prompts_per_step: int) -> Passes:
        """Count the passes of the policy gradient and of the teacher."""
        return Passes(
            student_reads=super().passes(prompts_per_step).student_reads,
            teacher_reads=make_teacher(self.settings).reads,
            teacher_reuses_keys=self.settings.teacher == "live",
        )
