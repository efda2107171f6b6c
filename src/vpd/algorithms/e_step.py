"""The E-step: refine the teacher on outcomes (VPD, arXiv 2605.15113, Algorithm 1, lines 9 to 14).

    r~(x,y,C) = beta * [ log q(y|x,C) - log pi_prior(y|x) ]
    L_E = - mean_{successes} log sigmoid( r~ - delta ) - mean_{failures} log sigmoid( -(r~ - delta) )
    delta = 1/2 ( mean r~ over successes + mean r~ over failures )

The prior is the student at the start of this E-step, by the trainer's own forward. It and delta are computed once and
stay as they are while the minibatches are worked through. A batch of one class has no E-step: delta would be undefined,
and a loss that only pushes up or down teaches no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd.algorithms.example import Example, minibatches, student_view, teacher_view
from vpd.config import VPD
from vpd.losses import implicit_rewards
from vpd.packing import PackedBatch
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner
from vpd.policy.objectives import Objective, Refine

SOURCES = ("environment", "sibling", "critique")


@dataclass(frozen=True)
class Margin:
    """Means of the implicit reward over one set of rollouts, all processes.

    Attributes:
        success, failure: mean r~ of each class; nan where the class is empty.
        success_count, failure_count: their sizes.
    """

    success: float
    failure: float
    success_count: int
    failure_count: int

    @property
    def margin(self) -> float:
        return self.success - self.failure

    @property
    def reward_shift(self) -> float:
        return 0.5 * (self.success + self.failure)


def measure_margin(learner: Learner, implicit_rewards: Tensor, is_success: Tensor) -> Margin:
    """Mean implicit reward [B] of successes and failures, over all processes."""
    rewards = implicit_rewards.double()
    success_sum, failure_sum, success_count, failure_count = learner.total(
        float(rewards[is_success].sum()),
        float(rewards[~is_success].sum()),
        int(is_success.sum()),
        int((~is_success).sum()),
    )
    return Margin(
        success_sum / success_count if success_count else math.nan,
        failure_sum / failure_count if failure_count else math.nan,
        int(success_count),
        int(failure_count),
    )


def holds_both_classes(learner: Learner, examples: Sequence[Example]) -> bool:
    """Whether the batch, over all processes, has a success and a failure: an E-step needs both."""
    successes = sum(example.is_success for example in examples)
    return all(learner.total(successes, len(examples) - successes))


def refine_teacher(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPD,
    batch_prompts: int,
    fresh: Sequence[Example] | None = None,
    memory: dict[str, float] | None = None,
) -> dict[str, float | None]:
    """Run one E-step on the active rollouts of a batch, which must hold both classes.

    Args:
        learner: the policy.
        examples: this process's active rollouts.
        settings: beta, minibatch and learning-rate factor.
        batch_prompts: prompts of the batch over all processes.
        fresh: held-out rollouts on which to measure the margin before and after; None (on every process) leaves it out.
        memory: where the shift is kept from one E-step to the next, for ``shift_momentum``.

    Returns:
        Metrics. Margins are those of the batch and of ``fresh``, before and after, of all rollouts and of those with
        each source of feedback; NaN where a class is absent.
    """

    def prior_of_student(of: Sequence[Example]) -> Tensor:
        weights = learner.copies[INITIAL] if settings.prior == "fixed" else None
        return learner.sequence_log_probs(of, student_view, weights)

    def rewards_of(of: Sequence[Example], prior: Tensor) -> Tensor:
        return implicit_rewards(learner.sequence_log_probs(of, teacher_view), prior, betas(of, settings))

    is_success = _successes(examples)
    prior = prior_of_student(examples)
    rewards_before = rewards_of(examples, prior)
    before = measure_margin(learner, rewards_before, is_success)
    margins = _margins_by_source(learner, "margin_before", examples, rewards_before)
    if fresh is not None:
        fresh_prior = prior_of_student(fresh)
        margins |= _margins_by_source(learner, "margin_fresh_before", fresh, rewards_of(fresh, fresh_prior))

    shift = before.reward_shift
    if memory is not None:
        shift += settings.shift_momentum * (memory.get("reward_shift", shift) - shift)
        memory["reward_shift"] = shift

    prior_of = {example.rollout: prior[index] for index, example in enumerate(examples)}
    steps = []
    for minibatch in minibatches(examples, settings.e_minibatch_prompts, batch_prompts) * settings.e_epochs:
        if not learner.total(len(minibatch))[0]:
            continue
        make_pass = _refining_pass(learner, settings, prior_of, before, shift)
        parts = learner.micro_batches(minibatch, [teacher_view])
        steps.append(learner.optimise(parts, make_pass, factor=settings.e_learning_rate_factor))

    margins |= _margins_by_source(learner, "margin_after", examples, rewards_of(examples, prior))
    if fresh is not None:
        margins |= _margins_by_source(learner, "margin_fresh_after", fresh, rewards_of(fresh, fresh_prior))
    return (
        {
            "e_step": 1.0,
            "e_loss": sum(step.loss for step in steps),
            "e_grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "e_clipped_share": sum(step.clipped for step in steps) / len(steps),
            "reward_shift": shift,
        }
        | margins
        | _gradient_weights(learner, rewards_before - shift, is_success)
        | _length_effects(learner, examples, rewards_before - shift, is_success)
    )


def betas(examples: Sequence[Example], settings: VPD) -> Tensor:
    """The implicit reward's temperature for each rollout [B]: one for all, unless a reference length is set."""
    lengths = torch.tensor([float(len(example.completion)) for example in examples])
    if settings.length_reference is None:
        return torch.full_like(lengths, settings.bco_beta)
    return settings.bco_beta * settings.length_reference / lengths


def _successes(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.is_success for example in examples], dtype=torch.bool)


def _margins_by_source(
    learner: Learner, name: str, examples: Sequence[Example], rewards: Tensor
) -> dict[str, float | None]:
    """The margin of implicit rewards [B] under ``name``, and under ``name_source`` that of each source alone.

    A margin that grows for one source only may be read off its template: the texts for successes and failures differ.
    """
    is_success = _successes(examples)
    margins: dict[str, float | None] = {name: measure_margin(learner, rewards, is_success).margin}
    for source in SOURCES:
        chosen = torch.tensor([example.source == source for example in examples], dtype=torch.bool)
        margins[f"{name}_{source}"] = measure_margin(learner, rewards[chosen], is_success[chosen]).margin
    return margins


def _refining_pass(
    learner: Learner, settings: VPD, prior_of: dict[int, Tensor], start: Margin, shift: float
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        return learner.pack(part, teacher_view), Refine(
            prior_log_probs=torch.stack([prior_of[example.rollout] for example in part]) if part else torch.zeros(0),
            is_success=torch.tensor([example.is_success for example in part], dtype=torch.bool),
            reward_shift=shift,
            success_count=start.success_count,
            failure_count=start.failure_count,
            betas=betas(part, settings),
            temperature=learner.temperature,
        )

    return make_pass


def _gradient_weights(learner: Learner, shifted_rewards: Tensor, is_success: Tensor) -> dict[str, float | None]:
    """Mean weight of each class's gradient at the start, between 0 and 1: a stale shift turns one of them off."""
    weights = torch.where(is_success, -shifted_rewards, shifted_rewards).sigmoid()
    measured = measure_margin(learner, weights, is_success)
    return {"e_weight_success": measured.success, "e_weight_failure": measured.failure}


def _length_effects(
    learner: Learner, examples: Sequence[Example], shifted_rewards: Tensor, is_success: Tensor
) -> dict[str, float | None]:
    """How length weighs in the implicit rewards that the E-step starts from, which are sums over tokens.

    ``misranked_share`` are rollouts on the wrong side of the shift, whose gradient grows with length;
    ``saturated_share`` those so far on the right side (sigmoid above 0.95) that they have next to none.
    """
    side = torch.where(is_success, shifted_rewards, -shifted_rewards)
    rewards = shifted_rewards.double()
    lengths = torch.tensor([len(example.completion) for example in examples], dtype=torch.float64)
    columns = (side < 0, side.sigmoid() > 0.95, rewards, lengths, rewards * lengths, rewards**2, lengths**2)
    count, *sums = learner.total(len(examples), *(float(column.sum()) for column in columns))
    misranked, saturated, reward, length, product, reward_square, length_square = (value / count for value in sums)
    variances = (reward_square - reward**2) * (length_square - length**2)
    return {
        "misranked_share": misranked,
        "saturated_share": saturated,
        "reward_length_correlation": (product - reward * length) / math.sqrt(variances) if variances > 1e-12 else None,
    }
