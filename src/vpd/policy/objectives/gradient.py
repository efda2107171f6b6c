"""Losses on the log-probabilities of completion tokens: imitation, the policy gradient, and sums of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vpd.losses import clipped_policy_gradient, reference_kl
from vpd.policy.objectives.base import Forward, Objective, Outputs, batch_log_probs


@dataclass(frozen=True)
class Imitate(Objective):
    """The negative log-likelihood of the completions.

    Attributes:
        token_count: The number of completion tokens of the minibatch, over all processes, which divides each token.
    """

    token_count: int

    def __call__(self, forward: Forward) -> Outputs:
        return Outputs(loss=-batch_log_probs(forward, temperature=1.0).sum() / self.token_count)


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """GRPO's clipped loss on the completion tokens; ``values["is_clipped"]`` [S] says where the ratio stopped counting.

    Attributes:
        advantages, old_log_probs, token_weights: [S] each.
        temperature: The temperature of the distribution.
        epsilon, epsilon_high: The bounds of the ratio.
        shaping: Makes the advantages [S] from the given ones and the log-ratio log q - log pi [S]; None leaves them.
        teacher_log_probs: [S], log q of each token for ``shaping``; nan where there is no teacher (a log-ratio of 0).
        reference_log_probs: [S], the log-probabilities under the initial model; None for no penalty.
        kl_weight: The weight of the penalty for leaving the initial model.
    """

    advantages: Tensor
    old_log_probs: Tensor
    token_weights: Tensor
    temperature: float
    epsilon: float
    epsilon_high: float
    shaping: Callable[[Tensor, Tensor], Tensor] | None = None
    teacher_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    kl_weight: float = 0.0

    def __call__(self, forward: Forward) -> Outputs:
        device = forward.hidden.device
        log_probs = batch_log_probs(forward, self.temperature)
        current, old = log_probs.detach(), self.old_log_probs.to(device)
        advantages, weights = self.advantages.to(device), self.token_weights.to(device)
        if self.shaping is not None and self.teacher_log_probs is not None:
            log_ratio = (self.teacher_log_probs.to(device) - current).nan_to_num(nan=0.0)
            advantages = self.shaping(advantages, log_ratio)
        loss = clipped_policy_gradient(
            log_probs, advantages, old, weights, clip_low=self.epsilon, clip_high=self.epsilon_high
        )
        if self.reference_log_probs is not None:
            reference = self.reference_log_probs.to(device)
            loss = loss + self.kl_weight * reference_kl(log_probs, reference, weights)
        ratio = torch.exp(current - old)
        outside = torch.where(advantages > 0, ratio > 1 + self.epsilon_high, ratio < 1 - self.epsilon)
        return Outputs(loss=loss, values={"is_clipped": outside & (advantages != 0)})


@dataclass(frozen=True)
class WeightedSum(Objective):
    """Several losses on the same tokens, each times its weight.

    Attributes:
        terms: The weights and the objectives; at most one of them may want layers.
    """

    terms: Sequence[tuple[float, Objective]]

    @property
    def layers(self) -> Sequence[int] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layers whose states one of the terms wants; None for all."""
        return next((term.layers for _, term in self.terms if term.layers != ()), ())

    def __call__(self, forward: Forward) -> Outputs:
        last = replace(forward, hidden=forward.hidden[:, : forward.head.weight.shape[1]])
        outputs = [(weight, term(last if term.layers == () else forward)) for weight, term in self.terms]
        losses = [weight * output.loss for weight, output in outputs if output.loss is not None]
        values = {name: value for _, output in outputs for name, value in output.values.items()}
        return Outputs(loss=torch.stack(losses).sum(), values=values)
