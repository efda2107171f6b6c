"""Variational Policy Distillation (arXiv 2605.15113): the teacher is the network itself behind the feedback prompt,
refined on outcomes every F rollout batches so that it stays ahead of the student that distils it.

E-iterations are the batches 1, 1+F, 1+2F, ...; the M-step works on the same rollouts against the refined teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vpd.algorithms.e_step import betas, holds_both_classes, refine_teacher
from vpd.algorithms.example import Example, with_teacher
from vpd.algorithms.m_step import MStepResult, distil, old_log_probs
from vpd.config import VPD
from vpd.policy.learner import Learner
from vpd.timing import Timer


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
    ``margin_on_arrival`` is the teacher's margin against the student on rollouts that no update has seen yet.
    """
    examples = with_teacher(examples)
    is_due = is_e_iteration(step, settings.e_step_every)
    with timer("m_step"):
        old = old_log_probs(learner, examples, settings, batch_prompts, e_step=is_due)
    metrics: dict[str, float | None] = {"e_step": None}
    refinement = None
    if is_due:
        metrics = {"e_step": 0.0}
        if holds_both_classes(learner, examples):
            fresh = sample_fresh() if sample_fresh is not None else None
            with timer("e_step"):
                after = not _m_step_reads_refined_teacher(settings, batch_prompts)
                refinement = refine_teacher(learner, examples, settings, batch_prompts, fresh, memory, after)
            metrics = refinement.metrics
    with timer("m_step"):
        result = distil(learner, examples, settings, batch_prompts, betas(examples, settings), old)
    if refinement is not None and "margin_after" not in metrics:
        refined = [sum(result.tokens[example.rollout].teacher_log_probs) for example in examples]
        metrics |= refinement.margins_after(torch.tensor(refined))
    # After an E-step the M-step's margin is that of a teacher refined on these same rollouts.
    arrival = result.metrics.get("margin") if refinement is None else metrics.get("margin_before")
    if refinement is not None and settings.prior == "fixed":
        arrival = None
    result.metrics = metrics | result.metrics | {"margin_on_arrival": arrival}
    return result


def _m_step_reads_refined_teacher(settings: VPD, batch_prompts: int) -> bool:
    """Whether the M-step's teacher is, for every rollout, the network as the E-step has left it."""
    minibatch = settings.m_minibatch_prompts
    is_whole = minibatch is None or minibatch >= batch_prompts
    return settings.teacher == "frozen" or (settings.teacher in ("live", "lora") and is_whole)
