"""Teacher refinement of the E-step: unpaired binary classifier optimisation (BCO) of the implicit reward.

    r~(x, y, C) = beta * [ log q(y | x, C) - log pi_prior(y | x) ]
    L_E = - mean_{successes} log sigmoid(r~ - delta) - mean_{failures} log sigmoid(-(r~ - delta))
    delta = 1/2 (mean r~ over successes + mean r~ over failures)

(VPD, arXiv 2605.15113, E-step and Algorithm 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def implicit_rewards(teacher_log_probs: Tensor, prior_log_probs: Tensor, beta: float | Tensor) -> Tensor:
    """r~ = beta * [log q(y|x,C) - log pi_prior(y|x)], in fp32.

    Args:
        teacher_log_probs: The teacher's log-probabilities [B], summed over each rollout's tokens, with gradient.
        prior_log_probs: The same sums [B] under the prior, which are constant.
        beta: The temperature of the implicit reward: one number, or [B] where it depends on the rollout's length.

    Returns:
        The implicit rewards [B].
    """
    return beta * (teacher_log_probs.float() - prior_log_probs.detach().float())


@dataclass(frozen=True)
class Margin:
    """The mean implicit reward of each class over one set of rollouts.

    Attributes:
        success, failure: The mean r~ of each class; nan where the class is empty.
        success_count, failure_count: The classes' sizes.
    """

    success: float
    failure: float
    success_count: int
    failure_count: int

    @property
    def margin(self) -> float:
        """By how much the teacher prefers successes."""
        return self.success - self.failure

    @property
    def reward_shift(self) -> float:
        """delta, the middle between the two means."""
        return 0.5 * (self.success + self.failure)


def measure_margin(total: Callable[..., list[float]], implicit_rewards: Tensor, is_success: Tensor) -> Margin:
    """The mean implicit reward of successes and failures, over all processes.

    Args:
        total: Sums numbers over all processes.
        implicit_rewards: [B], those of this process.
        is_success: [B], bool.
    """
    rewards = implicit_rewards.double()
    success_sum, failure_sum, success_count, failure_count = total(
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


def bco_loss(
    implicit_rewards: Tensor,
    is_success: Tensor,
    reward_shift: float | Tensor,
    *,
    success_count: int | None = None,
    failure_count: int | None = None,
) -> Tensor:
    """L_E = - mean_{successes} log sigmoid(r~ - delta) - mean_{failures} log sigmoid(-(r~ - delta)).

    Each class's sum is divided by its global count, so that the losses (and gradients) of micro-batches and ranks add
    up to those of the whole batch. A class that is absent contributes nothing; with no rows at all the loss is a zero
    that is joined to the graph.

    Args:
        implicit_rewards: The implicit rewards [B], with gradient.
        is_success: Which rollouts are successes, [B] bool.
        reward_shift: The shift delta, which is constant; a tensor is detached.
        success_count: How many successes the whole E-batch has, over micro-batches and ranks; None means those in this
            batch.
        failure_count: How many failures it has, likewise.

    Returns:
        A scalar in fp32.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or a global count below the count in this batch.
    """
    _check_rows(implicit_rewards, is_success)
    successes_here = int(is_success.sum())
    failures_here = len(is_success) - successes_here
    success_count = successes_here if success_count is None else success_count
    failure_count = failures_here if failure_count is None else failure_count
    if success_count < successes_here or failure_count < failures_here:
        raise ValueError(
            f"The batch holds {successes_here} successes and {failures_here} failures, more than the global counts "
            f"{success_count} and {failure_count}; pass counts over all micro-batches and ranks."
        )
    shift = reward_shift.detach().float() if isinstance(reward_shift, Tensor) else reward_shift
    margins = implicit_rewards.float() - shift
    losses = -F.logsigmoid(torch.where(is_success, margins, -margins))
    # An absent class has no row to divide, so its count of 0 may stand as 1.
    return losses[is_success].sum() / max(success_count, 1) + losses[~is_success].sum() / max(failure_count, 1)


def _check_rows(implicit_rewards: Tensor, is_success: Tensor) -> None:
    if implicit_rewards.dim() != 1 or is_success.shape != implicit_rewards.shape or is_success.dtype != torch.bool:
        raise ValueError(
            "implicit_rewards must be [rollouts] and is_success a bool tensor of the same shape, "
            f"got {tuple(implicit_rewards.shape)} and {tuple(is_success.shape)} of {is_success.dtype}."
        )
