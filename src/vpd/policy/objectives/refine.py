"""The E-step's loss, and delta, which follows from the implicit rewards of a whole E-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd.losses import bco_loss, implicit_rewards, measure_margin
from vpd.policy.objectives.base import Forward, Objective, Outputs, batch_log_probs, log_probs_of, sum_by_rollout


@dataclass(frozen=True)
class ShiftRule:
    """How delta follows from the implicit rewards of a whole E-batch (VPD, Algorithm 1, line 12).

    Attributes:
        total: Sums numbers over all processes. It is the one place where a loss needs them: delta is a mean over the
            E-batch, which may be known only once the first pass of the E-step has been made.
        momentum: The share of the previous delta that stays.
        previous: The previous E-step's delta; None where there was none.
    """

    total: Callable[..., list[float]]
    momentum: float = 0.0
    previous: float | None = None

    def __call__(self, rewards: Tensor, is_success: Tensor) -> float:
        """delta from the implicit rewards [B] of all of this process's rollouts."""
        shift = measure_margin(self.total, rewards.detach().float().cpu(), is_success).reward_shift
        return shift if self.previous is None else shift + self.momentum * (self.previous - shift)


@dataclass(frozen=True)
class Refine(Objective):
    """The E-step's loss: BCO on the implicit rewards of teacher sequences (VPD, Algorithm 1).

    ``values`` hold ``rewards`` [B], the implicit rewards, ``prior`` [B], log pi_prior(y|x), and ``shift`` [], delta.

    Attributes:
        prior_log_probs: The prior log pi_prior(y|x) of each rollout [B], without gradient. None takes it from the
            conditioned pass, which then is the student's.
        is_success: Whether each rollout counts as a success [B].
        shift: The shift delta, a constant of the E-step, or the rule that computes it. With the rule, this pass must
            hold the whole E-batch of each process.
        success_count, failure_count: The classes' sizes in the whole E-batch, over all processes.
        betas: The temperature of each rollout's implicit reward [B].
        temperature: The temperature of the distributions.
    """

    prior_log_probs: Tensor | None
    is_success: Tensor
    shift: float | ShiftRule
    success_count: int
    failure_count: int
    betas: Tensor
    temperature: float

    def __call__(self, forward: Forward) -> Outputs:
        log_probs = sum_by_rollout(batch_log_probs(forward, self.temperature), forward.batch)
        prior = self._conditioned_prior(forward) if self.prior_log_probs is None else self.prior_log_probs
        rewards = implicit_rewards(log_probs, prior.to(log_probs.device), self.betas.to(log_probs.device))
        shift = self.shift(rewards, self.is_success) if isinstance(self.shift, ShiftRule) else self.shift
        loss = bco_loss(
            rewards,
            self.is_success.to(log_probs.device),
            shift,
            success_count=self.success_count,
            failure_count=self.failure_count,
        )
        values = {"rewards": rewards.float(), "prior": prior, "shift": torch.tensor(shift, dtype=torch.float64)}
        return Outputs(loss=loss, values=values)

    @torch.no_grad()
    def _conditioned_prior(self, forward: Forward) -> Tensor:
        """log pi_prior(y|x) [B] from the conditioned pass, whose completion tokens are those of the batch."""
        states, targets = forward.conditioned, forward.batch.targets
        assert states is not None
        found = log_probs_of(states.hidden, states.rows, forward.head, targets, self.temperature, forward.chunk_size)
        lengths = torch.bincount(forward.batch.rollout, minlength=forward.batch.rollout_count)
        return torch.stack([values.sum() for values in found.float().cpu().split(lengths.tolist())])
