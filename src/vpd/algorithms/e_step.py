"""The E-step: refine the teacher on outcomes (VPD, arXiv 2605.15113, Algorithm 1, lines 9 to 14).

    r~(x,y,C) = beta * [ log q(y|x,C) - log pi_prior(y|x) ]
    L_E = - mean_{successes} log sigmoid( r~ - delta ) - mean_{failures} log sigmoid( -(r~ - delta) )
    delta = 1/2 ( mean r~ over successes + mean r~ over failures )

The prior is the student at the start of this E-step, by the trainer's own forward. It and delta are computed once and
stay as they are while the minibatches are worked through. A batch of one class is skipped and counted: delta would be
undefined, and a loss that only pushes up or down teaches no difference.
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
from vpd.policy.learner import Learner
from vpd.policy.objectives import Objective, Refine


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


def refine_teacher(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPD,
    batch_prompts: int,
    fresh: Sequence[Example] | None = None,
) -> dict[str, float | None]:
    """Run one E-step on the active rollouts of a batch.

    Args:
        learner: the policy.
        examples: this process's active rollouts.
        settings: beta, minibatch and learning-rate factor.
        batch_prompts: prompts of the batch over all processes.
        fresh: held-out rollouts on which to measure the margin before and after; None (on every process) leaves it out.

    Returns:
        Metrics; ``e_step`` is 0 where the batch held one class only.
    """
    is_success = torch.tensor([example.is_success for example in examples], dtype=torch.bool)
    success_count, failure_count = learner.total(int(is_success.sum()), int((~is_success).sum()))
    if not success_count or not failure_count:
        return {"e_step": 0.0}

    def rewards_of(of: Sequence[Example], prior: Tensor) -> Tensor:
        return implicit_rewards(learner.sequence_log_probs(of, teacher_view), prior, settings.bco_beta)

    prior = learner.sequence_log_probs(examples, student_view)
    rewards_before = rewards_of(examples, prior)
    before = measure_margin(learner, rewards_before, is_success)
    if fresh is not None:
        fresh_success = torch.tensor([example.is_success for example in fresh], dtype=torch.bool)
        fresh_prior = learner.sequence_log_probs(fresh, student_view)
        fresh_before = measure_margin(learner, rewards_of(fresh, fresh_prior), fresh_success)

    prior_of = {example.rollout: prior[index] for index, example in enumerate(examples)}
    steps = []
    with learner.scaled_learning_rate(settings.e_learning_rate_factor):
        for minibatch in minibatches(examples, settings.e_minibatch_prompts, batch_prompts):
            if not learner.total(len(minibatch))[0]:
                continue
            make_pass = _refining_pass(learner, settings, prior_of, before)
            steps.append(learner.optimise(learner.micro_batches(minibatch, [teacher_view]), make_pass))

    rewards = rewards_of(examples, prior)
    after = measure_margin(learner, rewards, is_success)
    metrics: dict[str, float | None] = {
        "e_step": 1.0,
        "e_loss": sum(step.loss for step in steps),
        "e_grad_norm": sum(step.grad_norm for step in steps) / len(steps),
        "e_clipped_share": sum(step.clipped for step in steps) / len(steps),
        "reward_shift": before.reward_shift,
        "margin_before": before.margin,
        "margin_after": after.margin,
    }
    for source in ("environment", "sibling"):
        of_source = torch.tensor([example.source == source for example in examples], dtype=torch.bool)
        part = measure_margin(learner, rewards[of_source], is_success[of_source])
        metrics[f"margin_{source}"] = part.margin
    if fresh is not None:
        fresh_after = measure_margin(learner, rewards_of(fresh, fresh_prior), fresh_success)
        metrics["margin_fresh_before"] = fresh_before.margin
        metrics["margin_fresh_after"] = fresh_after.margin
    return metrics | _length_effects(learner, examples, rewards_before - before.reward_shift, is_success)


def _refining_pass(
    learner: Learner, settings: VPD, prior_of: dict[int, Tensor], start: Margin
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        return learner.pack(part, teacher_view), Refine(
            prior_log_probs=torch.stack([prior_of[example.rollout] for example in part]) if part else torch.zeros(0),
            is_success=torch.tensor([example.is_success for example in part], dtype=torch.bool),
            reward_shift=start.reward_shift,
            success_count=start.success_count,
            failure_count=start.failure_count,
            bco_beta=settings.bco_beta,
            temperature=learner.temperature,
        )

    return make_pass


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
