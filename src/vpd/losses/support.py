"""Divergences over a few tokens of the vocabulary: the student's K most likely ones, or those among them that are also
the teacher's.

Cutting the sum off at K would give a wrong gradient, one that does not vanish where student and teacher agree. One of
three corrections accounts for the rest:

    tail          The rest is one bucket, which makes both sides proper distributions over K + 1 outcomes.
    renormalise   Both sides are scaled to sum to 1 over the K tokens.
    stopgrad      sum over the K of pi (stopgrad log pi - log q), with pi from the whole vocabulary; reverse KL only,
                  approximate (arXiv 2605.11182).

With each of them the gradient is zero where pi = q. The K tokens are chosen at every position, and are constants.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Support: TypeAlias = Literal["student", "intersection"]
Correction: TypeAlias = Literal["tail", "renormalise", "stopgrad"]

MOST_LOG_RATIO = 80.0
"""The bound of log-ratios before they are exponentiated: exp(80) is near the largest float."""


def supported_divergence(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    kind: str,
    alpha: float,
    top_k: int,
    support: Support,
    correction: Correction,
) -> tuple[Tensor, Tensor]:
    """The divergence [T] of one tile and its gradient with respect to the student's logits, [T, V].

    Args:
        student_log_probs: The student's log-probabilities [T, V].
        teacher_log_probs: The teacher's log-probabilities [T, V], which are used up as working memory.
        kind: ``reverse_kl``, ``forward_kl`` or ``js``.
        alpha: The teacher's share in the mixture of ``js``, strictly between 0 and 1.
        top_k: How many tokens are told apart, K, at most V.
        support: Whose K tokens these are; see the module.
        correction: What becomes of the rest; see the module.
    """
    tokens = student_log_probs.topk(top_k, dim=-1).indices
    is_member = torch.ones_like(tokens, dtype=torch.bool)
    if support == "intersection":
        likely = teacher_log_probs.topk(top_k, dim=-1).indices
        is_member = (tokens[:, :, None] == likely[:, None, :]).any(-1)
    student = student_log_probs.gather(1, tokens).masked_fill(~is_member, -math.inf)
    teacher = teacher_log_probs.gather(1, tokens).masked_fill(~is_member, -math.inf)

    if correction == "stopgrad":
        log_ratio = torch.where(is_member, student - teacher, 0.0)
        divergence = (student.exp() * log_ratio).sum(-1)
        gradient = student_log_probs.exp().mul_(-divergence[:, None])
        return divergence, gradient.scatter_add_(1, tokens, student.exp() * log_ratio)

    if correction == "renormalise":
        student, teacher = _renormalised(student), _renormalised(teacher)
        divergence, slope = _divergence_and_slope(student, teacher, kind, alpha)
        gradient = torch.zeros_like(student_log_probs).scatter_add_(1, tokens, student.exp() * slope)
        return divergence, gradient

    # The rest is one more outcome. Its probability is summed from the rest: 1 minus the others would cancel.
    chosen = torch.where(is_member, -math.inf, 0.0)
    rest = [
        log_probs.scatter_add(1, tokens, chosen).logsumexp(-1, keepdim=True)
        for log_probs in (student_log_probs, teacher_log_probs)
    ]
    outcomes = [torch.cat(pair, dim=1) for pair in ((student, rest[0]), (teacher, rest[1]))]
    divergence, slope = _divergence_and_slope(outcomes[0], outcomes[1], kind, alpha)
    # Each token of the rest takes its share of the bucket's gradient.
    gradient = torch.exp(student_log_probs, out=teacher_log_probs).mul_(slope[:, -1:])
    own = torch.where(is_member, student.exp() * slope[:, :-1], gradient.gather(1, tokens))
    return divergence, gradient.scatter_(1, tokens, own)


def _renormalised(log_probs: Tensor) -> Tensor:
    """The log-probabilities scaled to sum to 1 over the members; rows without members stay without."""
    total = log_probs.logsumexp(-1, keepdim=True)
    return torch.where(total.isneginf(), -math.inf, log_probs - total)


def _divergence_and_slope(student: Tensor, teacher: Tensor, kind: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The divergence [T] of two distributions over outcomes, and the factor of each outcome's pi in its gradient.

    An outcome that neither side can have (log-probability minus infinity on both) contributes nothing.
    """
    possible = ~(student.isneginf() & teacher.isneginf())
    log_ratio = torch.where(possible, teacher - student, 0.0).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    student_probs, teacher_probs = student.exp(), teacher.exp()
    if kind == "forward_kl":
        return (teacher_probs * log_ratio).sum(-1), torch.where(possible, 1.0 - log_ratio.exp(), 0.0)
    if kind == "reverse_kl":
        divergence = -(student_probs * log_ratio).sum(-1)
        return divergence, torch.where(possible, -log_ratio - divergence[:, None], 0.0)
    mixture_over_student = torch.logaddexp(log_ratio + math.log(alpha), torch.full_like(log_ratio, math.log1p(-alpha)))
    kl_student = -(student_probs * mixture_over_student).sum(-1)
    kl_teacher = (teacher_probs * (log_ratio - mixture_over_student)).sum(-1)
    slope = (alpha - 1.0) * (mixture_over_student + kl_student[:, None])
    return (1.0 - alpha) * kl_student + alpha * kl_teacher, torch.where(possible, slope, 0.0)
