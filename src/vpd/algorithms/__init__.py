"""Which loss on which rollouts when: one small file an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpd.algorithms import grpo, joint, opsa, reshape, reweight, sdpo, vpd
from vpd.algorithms.example import Example, make_examples
from vpd.algorithms.m_step import MStepResult
from vpd.config import GRPO, OPSA, SDPO, VPD, AlgorithmSettings, Joint, Reshape, Reweight
from vpd.policy.learner import Learner
from vpd.timing import Timer

__all__ = ["Example", "MStepResult", "make_examples", "update"]


def update(
    learner: Learner,
    examples: Sequence[Example],
    settings: AlgorithmSettings,
    step: int,
    batch_prompts: int,
    timer: Timer,
    sample_fresh: Callable[[], list[Example]] | None = None,
    memory: dict[str, float] | None = None,
) -> MStepResult:
    """Run the configured algorithm's updates on one batch of rollouts.

    Args:
        learner: the policy.
        examples: this process's graded rollouts, with and without feedback.
        settings: the algorithm's.
        step: rollout batch, counted from 1.
        batch_prompts: prompts of the batch over all processes.
        timer: collects the seconds of each phase.
        sample_fresh: makes held-out rollouts for measuring an E-step; None leaves the measurement out.
        memory: what an algorithm keeps from one batch to the next, saved with the run.
    """
    match settings:
        case VPD():
            return vpd.update(learner, examples, settings, step, batch_prompts, timer, sample_fresh, memory)
        case SDPO():
            return sdpo.update(learner, examples, settings, batch_prompts, timer)
        case GRPO():
            return grpo.update(learner, examples, settings, batch_prompts, timer)
        case Joint():
            return joint.update(learner, examples, settings, batch_prompts, timer)
        case Reshape():
            return reshape.update(learner, examples, settings, batch_prompts, timer)
        case Reweight():
            return reweight.update(learner, examples, settings, step, batch_prompts, timer)
        case OPSA():
            return opsa.update(learner, examples, settings, batch_prompts, timer)
