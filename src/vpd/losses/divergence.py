"""Distillation loss of the M-step: a divergence between student and teacher at every token.

Over the full vocabulary, unless a support of a few tokens is asked for (:mod:`vpd.losses.support`):

    reverse_kl   D = KL(pi || q)                                   dD/da = pi (log pi/q - D)
    forward_kl   D = KL(q || pi)                                   dD/da = pi - q
    js           D = (1 - alpha) KL(pi || M) + alpha KL(q || M)    dD/da = (1 - alpha) pi (log pi/M - KL(pi || M))
                 M = (1 - alpha) pi + alpha q

where a are the student's logits, pi = softmax(a), and q, the teacher, is constant. One pass over chunks of tokens
computes the loss *and* these gradients, so that backward has nothing to recompute: four matmuls per chunk (two without
gradient, three with a frozen head), and never more than a chunk of logits in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        total: scalar in fp32 with gradient, the sum of token weight x divergence.
        per_token: [T] in fp32, detached, the divergence in nats before the token weights.
        entropy: [T] in fp32, detached, the student's entropy in nats at the loss's temperature.
        student_log_probs, teacher_log_probs: [T] in fp32, detached, of the target tokens; None without targets.
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
        student_hidden: [T, H], any float dtype.
        teacher_hidden: [T, H'], at the same tokens; H' is the width of the teacher's head.
        student_head: maps the student's hidden states to logits.
        teacher_head: the teacher's; None means the student's.
        token_weights: [T], constants, e.g. 1 / (active tokens of the minibatch over all ranks); None means ones.
        targets: [T] ids of the tokens that were written, whose log-probabilities under both are wanted for the logs;
            they do not change the loss by themselves.
        old_log_probs: [T], of the ``targets`` under the policy that wrote them: each token's weight is multiplied by
            stopgrad(pi / pi_old) (SDPO's code, arXiv 2601.20802). None leaves the weights as they are.
        importance_clip: the most that it is multiplied by; None for no bound.
        kind: ``"reverse_kl"`` KL(pi||q), ``"forward_kl"`` KL(q||pi), or ``"js"``, generalised Jensen-Shannon.
        alpha: the teacher's share of the mixture of ``"js"``, in [0, 1]. The formula vanishes at both ends, where its
            rescaled limits stand in: 0 means forward KL, 1 reverse KL.
        temperature: divides the logits of both sides; the loss is not rescaled by its square.
        teacher_share: a, makes the target q' = a q + (1 - a) stopgrad(pi) (top-D, arXiv 2607.04751), in (0, 1]; 1 is
            the teacher itself.
        top_k: K, tokens of the vocabulary that are told apart; None means all of them.
        support: with ``top_k``, which: the ``"student"``'s most likely ones, or their ``"intersection"`` with the
            teacher's.
        correction: with ``top_k``, what becomes of the rest: ``"tail"``, ``"renormalise"``, or ``"stopgrad"`` (reverse
            KL only).
        chunk_size: tokens whose logits exist at a time.

    The total is differentiable once, in one backward pass, which gives away what was computed for it.

    Raises:
        ValueError: shapes that do not fit, heads with different vocabularies, or a setting out of range.
    """
    teacher_head = teacher_head or student_head
    check_settings(temperature, chunk_size)
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
    if token_weights is None:
        token_weights = torch.ones(student_hidden.shape[0], device=student_hidden.device)
    elif token_weights.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"token_weights must be [{student_hidden.shape[0]}], one for each token, "
            f"got shape {tuple(token_weights.shape)}."
        )
    if targets is not None and targets.shape != student_hidden.shape[:1]:
        raise ValueError(
            f"targets must be [{student_hidden.shape[0]}], one for each token, got shape {tuple(targets.shape)}."
        )
    if old_log_probs is not None and (targets is None or old_log_probs.shape != targets.shape):
        raise ValueError(
            f"old_log_probs are of the targets, one for each: got shape {tuple(old_log_probs.shape)} and "
            f"{'no targets' if targets is None else f'targets of shape {tuple(targets.shape)}'}."
        )
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(DivergenceKind))}; got {kind!r}.")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be between 0 (forward KL) and 1 (reverse KL), got {alpha}.")
    if not 0.0 < teacher_share <= 1.0:
        raise ValueError(f"teacher_share must be above 0 and at most 1, got {teacher_share}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 token, or None for all; got {top_k}.")
    if support not in get_args(Support) or correction not in get_args(Correction):
        raise ValueError(
            f"support must be one of {', '.join(get_args(Support))} and correction one of "
            f"{', '.join(get_args(Correction))}; got {support!r} and {correction!r}."
        )
    if top_k is not None and correction == "stopgrad" and kind != "reverse_kl":
        raise ValueError(f'The correction "stopgrad" is for reverse_kl, not {kind}: take "tail" or "renormalise".')
    if kind == "js" and alpha in (0.0, 1.0):
        kind = "forward_kl" if alpha == 0.0 else "reverse_kl"

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
        _Settings(
            kind,
            alpha,
            temperature,
            teacher_share,
            None if top_k is None else min(top_k, student_head.vocabulary_size),
            support,
            correction,
            importance_clip,
            chunk_size,
            torch.is_grad_enabled(),
            may_round_products(student_hidden.device),
        ),
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
    """Whether the caller is under ``torch.no_grad``: inside a Function's forward, gradient mode is always off."""
    rounded: bool
    """Whether products may round their factors to bfloat16."""


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
                    student_log_probs = logits[tile].log_softmax(-1)
                    teacher_log_probs = teacher_logits[tile].log_softmax(-1)
                    student_probs = student_log_probs.exp()
                    entropy[rows][tile] = -_row_dot(student_probs, student_log_probs)
                    if targets is not None:
                        written = targets[rows][tile, None]
                        target_log_probs[0][rows][tile] = student_log_probs.gather(1, written)[:, 0]
                        target_log_probs[1][rows][tile] = teacher_log_probs.gather(1, written)[:, 0]
                    if settings.teacher_share < 1.0:
                        teacher_log_probs = torch.logaddexp(
                            teacher_log_probs + math.log(settings.teacher_share),
                            student_log_probs + math.log1p(-settings.teacher_share),
                        )
                    per_token[rows][tile], grad_logits[tile] = _divergence_and_gradient(
                        student_log_probs, student_probs, teacher_log_probs, settings
                    )
                if old_log_probs is not None:
                    ratio = torch.exp(target_log_probs[0][rows] - old_log_probs[rows].float())
                    token_weights[rows] *= (
                        ratio if settings.importance_clip is None else ratio.clamp(max=settings.importance_clip)
                    )
                # A chunk's logits are the largest of what is made here: none of them outlives what reads it.
                del teacher_logits
                if any(needs):
                    gradient.add_chunk(rows, hidden, logits, grad_logits, token_weights[rows])
                del logits, grad_logits
            total = torch.dot(token_weights, per_token)

        # Not saved as tensors are: the backward pass gives them away, the largest of them as large as the head.
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
        is_whole = grad_total.device.type == "cpu" and float(grad_total) == 1.0
        gradients = [
            None if gradient is None else (gradient if is_whole else gradient.mul_(grad_total)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None, None


def _divergence_and_gradient(
    student_log_probs: Tensor, student_probs: Tensor, teacher_log_probs: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Divergence [T] of one tile and its gradient with respect to the student's logits, [T, V].

    The three inputs, [T, V] each, are used up as working memory.
    """
    if settings.top_k is not None:
        return supported_divergence(
            student_log_probs,
            teacher_log_probs,
            settings.kind,
            settings.alpha,
            settings.top_k,
            settings.support,
            settings.correction,
        )

    if settings.kind == "forward_kl":
        log_ratio = torch.sub(teacher_log_probs, student_log_probs, out=student_log_probs)
        teacher_probs = teacher_log_probs.exp_()
        return _row_dot(teacher_probs, log_ratio), student_probs.sub_(teacher_probs)

    if settings.kind == "reverse_kl":
        log_ratio = torch.sub(student_log_probs, teacher_log_probs, out=teacher_log_probs)
        divergence = _row_dot(student_probs, log_ratio)
        return divergence, log_ratio.sub_(divergence[:, None]).mul_(student_probs)

    alpha = settings.alpha
    # log M/pi = log(1 + alpha (q/pi - 1)): relative to pi, since log M itself is large against its difference to log pi
    # where alpha is small or the two are close.
    teacher_over_student = torch.sub(teacher_log_probs, student_log_probs, out=student_log_probs)
    # Beyond it pi is below 1e-34 and contributes nothing, and log q/M is -log alpha whatever the ratio is.
    teacher_over_student.clamp_(max=MOST_LOG_RATIO)
    mixture_over_student = torch.expm1(teacher_over_student).mul_(alpha).log1p_()
    teacher_over_mixture = teacher_over_student.sub_(mixture_over_student)
    kl_student = -_row_dot(student_probs, mixture_over_student)
    kl_teacher = _row_dot(teacher_log_probs.exp_(), teacher_over_mixture)
    grad_logits = mixture_over_student.add_(kl_student[:, None]).mul_(student_probs).mul_(alpha - 1.0)
    return (1.0 - alpha) * kl_student + alpha * kl_teacher, grad_logits


def _row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the vocabulary of the product of two [T, V] tensors -> [T]."""
    return torch.linalg.vecdot(left, right)
