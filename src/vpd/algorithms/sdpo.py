"""Self-distillation policy optimisation (SDPO, arXiv 2601.20802) with the live teacher: the M-step alone.

The teacher is the network itself behind the feedback prompt, as good as it happens to be: no outcome ever refines it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vpd.algorithms.example import Example, with_teacher
from vpd.algorithms.m_step import MStepResult, distil, old_log_probs
from vpd.config import SDPO
from vpd.policy.learner import Learner
from vpd.timing import Timer

# The margin is reported at VPD's default temperature, so that the curves of the two compare.
_MARGIN_BETA = 0.1


def update(
    learner: Learner, examples: Sequence[Example], settings: SDPO, batch_prompts: int, timer: Timer
) -> MStepResult:
    """One iteration's update: the M-step."""
    examples = with_teacher(examples)
    with timer("m_step"):
        old = old_log_probs(learner, examples, settings, batch_prompts)
        betas = torch.full((len(examples),), _MARGIN_BETA)
        result = distil(learner, examples, settings, batch_prompts, betas, old)
    result.metrics["margin_on_arrival"] = result.metrics.get("margin")
    return result
