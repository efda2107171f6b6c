"""OPSA (arXiv 2608.31046), a placebo without teacher or reward: what pushing down unlikely tokens gains by itself.

On the given share of a batch's completion tokens with the lowest log-probability the advantage is
-1/2 - 1/2 H / log V, with H the student's entropy there and V the vocabulary; elsewhere it is 0. The mean is over all
completion tokens, as GRPO's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vpd.algorithms.base import ExampleBatch, Passes, UpdateResult
from vpd.algorithms.example import Example, student_view
from vpd.algorithms.policy_step import PolicyGradientAlgorithm, policy_step
from vpd.config import PolicyGradientSettings
from vpd.policy.architecture import head_of
from vpd.policy.learner import Learner
from vpd.policy.objectives import TokenLogProbs


class OPSASettings(PolicyGradientSettings):
    """A control without teacher and reward: it lowers the least likely of the tokens that were written."""

    type: Literal["opsa"] = "opsa"  # pyright: ignore[reportIncompatibleVariableOverride]
    token_share: float = Field(default=0.2, gt=0, le=1)
    """The share of a batch's completion tokens that are lowered, those of the smallest probability."""


class OPSA(PolicyGradientAlgorithm[OPSASettings]):
    """The policy gradient with advantages from the student's own probabilities."""

    settings_class = OPSASettings

    def passes(self, prompts_per_step: int) -> Passes:
        """The advantages come from one more pass than a policy gradient makes."""
        passes = super().passes(prompts_per_step)
        return replace(passes, student_reads=passes.student_reads + 1)

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        advantages = lowest_token_advantages(learner, batch.examples, self.settings.token_share)
        return policy_step(learner, batch, self.settings, advantages)


def lowest_token_advantages(learner: Learner, examples: Sequence[Example], share: float) -> dict[int, Tensor]:
    """The advantage of each completion token [T], by rollout index."""
    objective = TokenLogProbs(learner.temperature, entropy=True)
    found = learner.token_values(examples, student_view, objective)
    own = torch.cat([values["log_probs"] for values in found]) if found else torch.zeros(0)
    log_probs = learner.gather(own).sort().values
    if not len(log_probs):
        return {}
    threshold = log_probs[max(math.ceil(share * len(log_probs)), 1) - 1]
    scale = 0.5 / math.log(head_of(learner.module.model).vocabulary_size)
    return {
        example.rollout: torch.where(values["log_probs"] <= threshold, -0.5 - scale * values["entropy"], 0.0)
        for example, values in zip(examples, found, strict=True)
    }
