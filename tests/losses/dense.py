"""Divergences as the textbook has them, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ["reverse_kl", "forward_kl", "js"]


def parameter(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).requires_grad_()


def dense_divergence(
    student_logits: Tensor, teacher_logits: Tensor, kind: str, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Per-token divergence and student entropy in float64, written as the textbook has them."""
    pi, q = student_logits.softmax(-1), teacher_logits.detach().softmax(-1)

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return (left * (left.log() - right.log())).sum(-1)

    if kind == "js":
        mixture = (1 - alpha) * pi + alpha * q
        per_token = (1 - alpha) * kl(pi, mixture) + alpha * kl(q, mixture)
    else:
        per_token = kl(pi, q) if kind == "reverse_kl" else kl(q, pi)
    return per_token, -(pi * pi.log()).sum(-1)


def close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
