"""Distillation loss of the M-step: a divergence between student and teacher at every token.

It is taken over the full vocabulary, or over a few tokens of it (:mod:`vpd.losses.support`):

    reverse_kl   D = KL(pi || q)                                   dD/da = pi (log pi/q - D)
    forward_kl   D = KL(q || pi)                                   dD/da = pi - q
    js           D = (1 - alpha) KL(pi || M) + alpha KL(q || M)    dD/da = (1 - alpha) pi (log pi/M - KL(pi || M))
                 M = (1 - alpha) pi + alpha q

Here a are the student's logits, pi = softmax(a), and q, the teacher, is constant. One pass over chunks of tokens
computes the loss *and* these gradients, so that the backward pass recomputes nothing: it takes four matmuls per chunk
(two without gradient, three with a frozen head), and no more than a chunk of logits is in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpd.device import is_cpu
from vpd.losses.head import (
    DEFAULT_CHUNK_SIZE,
    Head,
    HeadGradient,
    HeadProducts,
    check_hidden,
    check_settings,
    chunks,
    may_round_products,
    tiles,
)
from vpd.losses.support import MOST_LOG_RATIO, Correction, Support, supported_divergence

DivergenceKind: TypeAlias = Literal["reverse_kl", "forward_kl", "js"]


@dataclass(frozen=True)
class TokenLoss:
    """A loss that is a weighted sum over tokens, with what each token contributed.

    Attributes:
        total: The loss, a scalar in fp32 with gradient: the sum of token weight x divergence.
        per_token: The divergence [T] in nats before the token weights, in fp32, detached.
        entropy: The student's entropy [T] in nats at the loss's temperature, in fp32, detached.
        student_log_probs: The student's log-probabilities [T] of the target tokens, in fp32, detached; None without
            targets.
        teacher_log_probs: The teacher's log-probabilities of the same tokens.
    """

    total: Tensor
    per_token: Tensor
    entropy: Tensor
    student_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None


def divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head | None = None,
    *,
    token_weights: Tensor | None = None,
    targets: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    importance_clip: float | None = None,
    kind: DivergenceKind = "reverse_kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    teacher_share: float = 1.0,
    top_k: int | None = None,
    support: Support = "student",
    correction: Correction = "tail",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> TokenLoss:
    """Divergence between student pi and teacher q at each token (VPD, arXiv 2605.15113, M-step).

    The gradient goes to the student's hidden states and head only; the teacher is constant also where both share one
    head. With no tokens, ``total`` is a zero that is joined to the graph, so that every rank can call backward.

    Args:
        student_hidden: The student's hidden states [T, H] in any float dtype.
        teacher_hidden: The teacher's hidden states [T, H'] at the same tokens; H' is the width of the teacher's head.
        student_head: The head that maps the student's hidden states to logits.
        teacher_head: The teacher's head; None means the student's.
        token_weights: The constant weights [T], e.g. 1 / (active tokens of the minibatch over all ranks); None means
            ones.
        targets: The ids [T] of the tokens that were written. Their log-probabilities under both sides are wanted for
            the logs; they do not change the loss by themselves.
        old_log_probs: The log-probabilities [T] of the ``targets`` under the policy that wrote them: each token's
            weight is multiplied by stopgrad(pi / pi_old) (SDPO's code, arXiv 2601.20802). None leaves the weights as
            they are.
        importance_clip: The upper bound of that factor; None for no bound.
        kind: ``"reverse_kl"`` KL(pi||q), ``"forward_kl"`` KL(q||pi), or ``"js"``, generalised Jensen-Shannon.
        alpha: The teacher's share of the mixture of ``"js"``, in [0, 1]. The formula vanishes at both ends, where its
            rescaled limits stand in: 0 means forward KL, 1 reverse KL.
        temperature: The temperature that the logits of both sides are divided by; the loss is not rescaled by its
            square.
        teacher_share: The teacher's share a in the target q' = a q + (1 - a) stopgrad(pi) (top-D, arXiv 2607.04751), in
            (0, 1]; 1 is the teacher itself.
        top_k: How many tokens of the vocabulary are told apart, K; None means all of them.
        support: With ``top_k``, which tokens these are: the ``"student"``'s most likely ones, or their
            ``"intersection"`` with the teacher's.
        correction: With ``top_k``, what becomes of the rest: ``"tail"``, ``"renormalise"``, or ``"stopgrad"`` (reverse
            KL only).
        chunk_size: How many tokens' logits exist at a time.

    Returns:
        The loss and what each token contributed. The total is differentiable once: its backward pass gives away the
        gradients that were computed for it.

    Raises:
        ValueError: Shapes that do not fit, heads with different vocabularies, or a setting out of range.
    """
    teacher_head = teacher_head or student_head
    settings = _Settings(
        kind,
        alpha,
        temperature,
        teacher_share,
        top_k,
        support,
        correction,
        importance_clip,
        chunk_size,
        torch.is_grad_enabled(),
        may_round_products(student_hidden.device),
    )
    _check_sides(student_hidden, teacher_hidden, student_head, teacher_head)
    if token_weights is None:
        token_weights = torch.ones(student_hidden.shape[0], device=student_hidden.device)
    _check_tokens(len(student_hidden), token_weights, targets, old_log_probs)
    total, per_token, entropy, student_log_probs, teacher_log_probs = _FusedDivergence.apply(
        student_hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden,
        token_weights,
        targets,
        old_log_probs,
        student_head,
        teacher_head,
        settings,
    )
    if targets is None:
        return TokenLoss(total, per_token, entropy)
    return TokenLoss(total, per_token, entropy, student_log_probs, teacher_log_probs)


@dataclass(frozen=True)
class _Settings:
    kind: DivergenceKind
    alpha: float
    temperature: float
    teacher_share: float
    top_k: int | None
    support: Support
    correction: Correction
    importance_clip: float | None
    chunk_size: int
    grad_enabled: bool
    """Whether the caller wants gradients: inside a Function's forward, gradient mode is always off."""
    rounded: bool
    """Whether products may round their factors."""

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.chunk_size)
        if self.kind not in get_args(DivergenceKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(DivergenceKind))}; got {self.kind!r}.")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be between 0 (forward KL) and 1 (reverse KL), got {self.alpha}.")
        if not 0.0 < self.teacher_share <= 1.0:
            raise ValueError(f"teacher_share must be above 0 and at most 1, got {self.teacher_share}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 token, or None for all; got {self.top_k}.")
        if self.support not in get_args(Support) or self.correction not in get_args(Correction):
            raise ValueError(
                f"support must be one of {', '.join(get_args(Support))} and correction one of "
                f"{', '.join(get_args(Correction))}; got {self.support!r} and {self.correction!r}."
            )
        if self.top_k is not None and self.correction == "stopgrad" and self.kind != "reverse_kl":
            raise ValueError(
                f'The correction "stopgrad" is for reverse_kl, not {self.kind}: take "tail" or "renormalise".'
            )

    @property
    def proper_kind(self) -> DivergenceKind:
        """The kind, with its limit in the place of a Jensen-Shannon divergence that would vanish."""
        if self.kind == "js" and self.alpha in (0.0, 1.0):
            return "forward_kl" if self.alpha == 0.0 else "reverse_kl"
        return self.kind


def _check_sides(student_hidden: Tensor, teacher_hidden: Tensor, student_head: Head, teacher_head: Head) -> None:
    check_hidden("student_hidden", student_hidden, student_head)
    check_hidden("teacher_hidden", teacher_hidden, teacher_head)
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"student_hidden has {student_hidden.shape[0]} tokens and teacher_hidden {teacher_hidden.shape[0]}; "
            "both must hold the same completion tokens."
        )
    if student_head.vocabulary_size != teacher_head.vocabulary_size:
        raise ValueError(
            f"The student's head has {student_head.vocabulary_size} words and the teacher's "
            f"{teacher_head.vocabulary_size}; a divergence needs one vocabulary."
        )


def _check_tokens(count: int, token_weights: Tensor, targets: Tensor | None, old_log_probs: Tensor | None) -> None:
    if token_weights.shape != (count,):
        raise ValueError(
            f"token_weights must be [{count}], one for each token, got shape {tuple(token_weights.shape)}."
        )
    if targets is not None and targets.shape != (count,):
        raise ValueError(f"targets must be [{count}], one for each token, got shape {tuple(targets.shape)}.")
    if old_log_probs is not None and (targets is None or old_log_probs.shape != targets.shape):
        raise ValueError(
            f"old_log_probs are of the targets, one for each: got shape {tuple(old_log_probs.shape)} and "
            f"{'no targets' if targets is None else f'targets of shape {tuple(targets.shape)}'}."
        )


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        token_weights: Tensor,
        targets: Tensor | None,
        old_log_probs: Tensor | None,
        student_head: Head,
        teacher_head: Head,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        shared_head = teacher_head is student_head
        student_head = student_head.detached_float32()
        teacher_head = student_head if shared_head else teacher_head.detached_float32()
        token_weights = token_weights.float() if old_log_probs is None else token_weights.float().clone()
        per_token = token_weights.new_empty(student_hidden.shape[0])
        entropy = torch.empty_like(per_token)
        target_log_probs = [torch.empty_like(per_token), torch.empty_like(per_token)]
        needs = ctx.needs_input_grad[:3] if settings.grad_enabled else (False, False, False)

        temperature = settings.temperature
        with torch.autocast(student_hidden.device.type, enabled=False):
            products = HeadProducts(student_head.weight, rounded=settings.rounded)
            teacher_products = products if shared_head else HeadProducts(teacher_head.weight, rounded=settings.rounded)
            gradient = HeadGradient(student_head, products, student_hidden, needs, temperature)
            for rows in chunks(student_hidden.shape[0], settings.chunk_size):
                hidden = student_hidden[rows].float()
                logits = student_head.logits(hidden, temperature, products=products)
                teacher_logits = teacher_head.logits(teacher_hidden[rows], temperature, products=teacher_products)
                # The logits' memory is free for their gradient, unless a softcap's gradient will read them.
                grad_logits = logits if student_head.softcap is None else torch.empty_like(logits)
                for tile in tiles(logits):
                    written = None if targets is None else targets[rows][tile]
                    read = _read_tile(logits[tile], teacher_logits[tile], written, settings)
                    per_token[rows][tile], grad_logits[tile], entropy[rows][tile] = read[:3]
                    if written is not None:
                        target_log_probs[0][rows][tile], target_log_probs[1][rows][tile] = read[3:]
                if old_log_probs is not None:
                    ratio = torch.exp(target_log_probs[0][rows] - old_log_probs[rows].float())
                    token_weights[rows] *= (
                        ratio if settings.importance_clip is None else ratio.clamp(max=settings.importance_clip)
                    )
                # A chunk's logits are the largest tensors here: none of them outlives what reads it.
                del teacher_logits
                if any(needs):
                    gradient.add_chunk(rows, hidden, logits, grad_logits, token_weights[rows])
                del logits, grad_logits
            total = torch.dot(token_weights, per_token)

        # They are not saved as tensors, so that the backward pass can give them away: one is as large as the head.
        ctx.gradients = (gradient.hidden, gradient.weight, gradient.bias)
        ctx.dtypes = (student_hidden.dtype, student_weight.dtype, None if student_bias is None else student_bias.dtype)
        ctx.mark_non_differentiable(per_token, entropy, *target_log_probs)
        return total, per_token, entropy, *target_log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The divergence's gradient has been given away: there is no second backward pass. Compute the "
                "divergence again, or take all gradients in one call."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Elsewhere reading the number would wait for the device.
        is_whole = is_cpu(grad_total) and float(grad_total) == 1.0
        gradients = [
            None if gradient is None else (gradient if is_whole else gradient.mul_(grad_total)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _read_tile(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor | None, settings: _Settings
) -> tuple[Tensor, ...]:
    """What a few tokens contribute: divergence [T], its gradient with respect to the student's logits [T, V], and the
    student's entropy [T]; with ``targets`` [T] also their log-probabilities [T] under student and teacher."""
    student_log_probs = logits.log_softmax(-1)
    teacher_log_probs = teacher_logits.log_softmax(-1)
    student_probs = student_log_probs.exp()
    others = [-_row_dot(student_probs, student_log_probs)]
    if targets is not None:
        sides = (student_log_probs, teacher_log_probs)
        others += [log_probs.gather(1, targets[:, None])[:, 0] for log_probs in sides]
    if settings.teacher_share < 1.0:
        teacher_log_probs = torch.logaddexp(
            teacher_log_probs + math.log(settings.teacher_share),
            student_log_probs + math.log1p(-settings.teacher_share),
        )
    return *_divergence_and_gradient(student_log_probs, student_probs, teacher_log_probs, settings), *others


def _divergence_and_gradient(
    student_log_probs: Tensor, student_probs: Tensor, teacher_log_probs: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Divergence [T] of one tile and its gradient with respect to the student's logits, [T, V].

    The three inputs, [T, V] each, are used up as working memory.
    """
    kind = settings.proper_kind
    if settings.top_k is not None:
        return supported_divergence(
            student_log_probs,
            teacher_log_probs,
            kind,
            settings.alpha,
            min(settings.top_k, student_log_probs.shape[1]),
            settings.support,
            settings.correction,
        )

    if kind == "forward_kl":
        log_ratio = torch.sub(teacher_log_probs, student_log_probs, out=student_log_probs)
        teacher_probs = teacher_log_probs.exp_()
        return _row_dot(teacher_probs, log_ratio), student_probs.sub_(teacher_probs)

    if kind == "reverse_kl":
        log_ratio = torch.sub(student_log_probs, teacher_log_probs, out=teacher_log_probs)
        divergence = _row_dot(student_probs, log_ratio)
        return divergence, log_ratio.sub_(divergence[:, None]).mul_(student_probs)

    alpha = settings.alpha
    # log M/pi = log(1 + alpha (q/pi - 1)) is taken relative to pi: log M itself is large against its difference to
    # log pi where alpha is small or the two are close.
    teacher_over_student = torch.sub(teacher_log_probs, student_log_probs, out=student_log_probs)
    # Beyond the bound pi is below 1e-34 and contributes nothing, and log q/M is -log alpha whatever the ratio is.
    teacher_over_student.clamp_(max=MOST_LOG_RATIO)
    mixture_over_student = torch.expm1(teacher_over_student).mul_(alpha).log1p_()
    teacher_over_mixture = teacher_over_student.sub_(mixture_over_student)
    kl_student = -_row_dot(student_probs, mixture_over_student)
    kl_teacher = _row_dot(teacher_log_probs.exp_(), teacher_over_mixture)
    grad_logits = mixture_over_student.add_(kl_student[:, None]).mul_(student_probs).mul_(alpha - 1.0)
    return (1.0 - alpha) * kl_student + alpha * kl_teacher, grad_logits


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum over the vocabulary of the product of two [T, V] tensors, [T]."""
    return torch.linalg.vecdot(left, right)
