"""Losses whose gradient is a weighted sum of grad log pi(y_t) over the tokens that were written.

They take log-probabilities with gradient, as :func:`vpd.losses.token_log_probs` gives them. Everything else is
constant.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_gradient(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
) -> Tensor:
    """PPO's clipped objective, as a loss: - sum_t w_t min(rho_t A_t, clip(rho_t) A_t), rho_t = pi / pi_old.

    Args:
        log_probs: The log-probabilities [T] log pi(y_t), with gradient.
        advantages: The advantages [T].
        old_log_probs: The log-probabilities [T] under the policy that wrote the tokens.
        token_weights: The weights [T], such as 1 / (tokens of the minibatch over all processes).
        clip_low: rho is at least 1 - clip_low; None for no bound.
        clip_high: rho is at most 1 + clip_high (DAPO's clip-higher); None for no bound.

    Returns:
        A scalar in fp32.
    """
    log_probs = log_probs.float()
    ratio = torch.exp(log_probs - old_log_probs.detach().float())
    advantages = advantages.detach().float()
    clipped = (
        ratio.clamp(None if clip_low is None else 1.0 - clip_low, None if clip_high is None else 1.0 + clip_high)
        if clip_low is not None or clip_high is not None
        else ratio
    )
    return -(token_weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, token_weights: Tensor) -> Tensor:
    """GRPO's penalty for leaving a reference policy: sum_t w_t (u_t - log u_t - 1), u_t = pi_reference / pi.

    Each term is at least 0. For y_t drawn from pi it is an unbiased estimate of KL_t(pi || pi_reference).

    Args:
        log_probs: The log-probabilities [T] log pi(y_t), with gradient.
        reference_log_probs: The log-probabilities [T] under the reference policy.
        token_weights: The weights [T].

    Returns:
        A scalar in fp32.
    """
    difference = reference_log_probs.detach().float() - log_probs.float()
    return (token_weights * (difference.exp() - difference - 1.0)).sum()


def sampled_divergence(
    log_probs: Tensor,
    teacher_log_probs: Tensor,
    token_weights: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    baseline: Tensor | None = None,
    importance_clip: float | None = None,
) -> Tensor:
    """A loss whose expected gradient is that of sum_t w_t KL_t(pi || q) at fixed prefixes, for y_t drawn from pi_old.

        A_t = log q(y_t) - log pi(y_t) [+ KL_t(pi || q)],   loss = - sum_t w_t stopgrad(rho_t A_t) log pi(y_t)

    The term in brackets is vOPD's control variate (arXiv 2605.07865): it does not change the expectation, and usually
    lowers the variance. The effect of a token on later divergences is left out, as in the exact forms.

    Args:
        log_probs: The log-probabilities [T] log pi(y_t), with gradient.
        teacher_log_probs: The log-probabilities [T] log q(y_t).
        token_weights: The weights [T].
        old_log_probs: The log-probabilities [T] under the policy that wrote the tokens; None where it is pi itself
            (rho_t = 1).
        baseline: The divergences [T] KL_t(pi || q); None leaves the control variate out.
        importance_clip: The largest rho_t, which makes the estimate biased; None for no bound.

    Returns:
        A scalar in fp32. Its value means little; its gradient counts.
    """
    log_probs = log_probs.float()
    current = log_probs.detach()
    advantages = teacher_log_probs.detach().float() - current
    if baseline is not None:
        advantages = advantages + baseline.detach()
    if old_log_probs is not None:
        ratio = torch.exp(current - old_log_probs.detach().float())
        if importance_clip is not None:
            ratio = ratio.clamp(max=importance_clip)
        advantages = ratio * advantages
    return -(token_weights * advantages * log_probs).sum()
