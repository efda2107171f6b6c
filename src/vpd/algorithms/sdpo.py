"""Self-distillation policy optimisation (SDPO, arXiv 2601.20802): the M-step alone.

The teacher is the network itself, conditioned on the feedback, or its running average, as good as it happens to be: no
outcome ever refines it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from vpd.algorithms.base import ExampleBatch, UpdateResult
from vpd.algorithms.distillation import DistillationAlgorithm
from vpd.algorithms.example import with_teacher
from vpd.algorithms.m_step import distil, old_log_probs
from vpd.config import MStepSettings, bounded_importance
from vpd.policy.learner import Learner
from vpd.timing import Timer

# The margin is reported at VPD's default temperature, so that the curves of the two compare.
_MARGIN_BETA = 0.1


class SDPOSettings(MStepSettings):
    """Self-distillation policy optimisation: VPD's loop without E-steps."""

    type: Literal["sdpo"] = "sdpo"  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher: Literal["live", "frozen", "ema", "trust_region", "lora"] = "ema"
    """Whose predictions are distilled: a running average's, as in the paper's baseline. ``live`` is VPD without its
    E-steps (with ``importance_clip`` 0, where a batch has several M-minibatches)."""
    importance_clip: float | None = Field(default_factory=bounded_importance, ge=0)
    """The bound on tokens' weights, 2 as in SDPO's code. Tokens weigh something else than 1 with several M-minibatches.
    With ``sampled`` there is no bound."""


class SDPO(DistillationAlgorithm[SDPOSettings]):
    """The M-step on every batch."""

    settings_class = SDPOSettings

    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        examples, timer = with_teacher(batch.examples), Timer()
        with timer("m_step"):
            old = old_log_probs(learner, examples, self.settings, batch.prompts)
            betas = torch.full((len(examples),), _MARGIN_BETA)
            result = distil(learner, examples, self.settings, batch.prompts, betas, old)
        result.metrics["margin_on_arrival"] = result.metrics.get("margin")
        result.seconds = dict(timer.seconds)
        return result
