"""Variational Policy Distillation (arXiv 2605.15113): the teacher is the network itself behind the feedback prompt,
refined on outcomes every F rollout batches so that it stays ahead of the student that distils it.

E-iterations are the batches 1, 1+F, 1+2F, ...; the M-step works on the same rollouts against the refined teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vpd.algorithms.e_step import holds_both_classes, refine_teacher
from vpd.algorithms.example import Example, with_teacher
from vpd.algorithms.m_step import MStepResult, distil, old_log_probs
from vpd.config import VPD
from vpd.policy.learner import Learner
from vpd.runs.timing import Timer


def is_e_iteration(step: int, e_step_every: int) -> bool:
    """Whether rollout batch ``step``, counted from 1, begins with an E-step."""
    return (step - 1) % e_step_every == 0


def update(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPD,
    step: int,
    batch_prompts: int,
    timer: Timer,
    sample_fresh: Callable[[], list[Example]] | None = None,
    memory: dict[str, float] | None = None,
) -> MStepResult:
    """One iteration's updates: the E-step where it is due and possible, then the M-step.

    The metric ``e_step`` is 1 for an E-step, 0 for one that was due but had one class only, None where none was due.
    """
    examples = with_teacher(examples)
    with timer("m_step"):
        old = old_log_probs(learner, examples, settings)
    metrics: dict[str, float | None] = {"e_step": None}
    if is_e_iteration(step, settings.e_step_every):
        metrics = {"e_step": 0.0}
        if holds_both_classes(learner, examples):
            fresh = sample_fresh() if sample_fresh is not None else None
            with timer("e_step"):
                metrics = refine_teacher(learner, examples, settings, batch_prompts, fresh, memory)
    with timer("m_step"):
        result = distil(learner, examples, settings, batch_prompts, settings.bco_beta, old)
    result.metrics = metrics | result.metrics
    return result
