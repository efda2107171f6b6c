"""Divergences over a few tokens, against a dense form that autograd differentiates."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense import KINDS, close, dense_divergence, parameter
from torch import Tensor

from vpd.losses import Head, divergence
from vpd.losses.divergence import DivergenceKind

T, H, V, K = 11, 6, 17, 4
OFFERED = [
    (kind, support, correction)
    for kind, support, correction in itertools.product(
        KINDS, ["student", "intersection"], ["tail", "renormalise", "stopgrad"]
    )
    if correction != "stopgrad" or kind == "reverse_kl"
]


def members(student_logits: Tensor, teacher_logits: Tensor, support: str) -> Tensor:
    """[T, V], whether a token is told apart from the rest."""
    chosen = [
        torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(K, -1).indices, True)
        for logits in (student_logits, teacher_logits)
    ]
    return chosen[0] & chosen[1] if support == "intersection" else chosen[0]


def dense_supported(student_logits, teacher_logits, kind, alpha, support, correction) -> Tensor:
    """Per-token loss in float64; of ``stopgrad`` the surrogate whose gradient counts."""
    inside = members(student_logits, teacher_logits, support)
    rows = []
    for row in range(len(inside)):
        student, teacher, mask = student_logits[row], teacher_logits[row].detach(), inside[row]
        if correction == "stopgrad":
            log_ratio = (student.log_softmax(-1).detach() - teacher.log_softmax(-1))[mask]
            rows.append((student.softmax(-1)[mask] * log_ratio).sum())
            continue
        if correction == "renormalise":
            student, teacher = student[mask], teacher[mask]
        elif not mask.all():
            student, teacher = (torch.cat([x[mask], x[~mask].logsumexp(0)[None]]) for x in (student, teacher))
        if len(student) == 0:
            rows.append(student.sum())
            continue
        rows.append(dense_divergence(student[None], teacher[None], kind, alpha)[0][0])
    return torch.stack(rows)


def states(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return parameter(generator, T, H), torch.randn(T, H, generator=generator), parameter(generator, V, H)


@pytest.mark.parametrize(("kind", "support", "correction"), OFFERED)
@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0}])
@pytest.mark.parametrize(("temperature", "chunk_size"), [(1.0, 100), (0.7, 3)])
def test_values_and_gradients_equal_the_dense_form(
    kind, support, correction, settings, temperature, chunk_size, dense_logits
):
    student_hidden, teacher_hidden, weight = states()
    head = Head(weight, **settings)
    token_weights = torch.rand(T, generator=torch.Generator().manual_seed(1))
    loss = divergence(
        student_hidden,
        teacher_hidden,
        head,
        token_weights=token_weights,
        kind=kind,
        alpha=0.3,
        temperature=temperature,
        top_k=K,
        support=support,
        correction=correction,
        chunk_size=chunk_size,
    )
    gradients = torch.autograd.grad(2.0 * loss.total, [student_hidden, weight])

    logits = [dense_logits(hidden, head, temperature) for hidden in (student_hidden, teacher_hidden)]
    per_token = dense_supported(*logits, kind, 0.3, support, correction)
    close(loss.per_token, per_token)
    total = (token_weights * per_token).sum()
    for actual, expected in zip(gradients, torch.autograd.grad(2.0 * total, [student_hidden, weight]), strict=True):
        close(actual, expected)


@pytest.mark.parametrize(("kind", "support", "correction"), OFFERED)
@pytest.mark.parametrize("top_k", [V, V + 5])
def test_all_tokens_told_apart_is_the_full_divergence(kind, support, correction, top_k):
    student_hidden, teacher_hidden, weight = states(1)

    def value_and_gradient(**settings):
        loss = divergence(student_hidden, teacher_hidden, Head(weight), kind=kind, alpha=0.3, **settings)
        return loss.per_token, torch.autograd.grad(loss.total, student_hidden)[0]

    for actual, expected in zip(
        value_and_gradient(top_k=top_k, support=support, correction=correction), value_and_gradient(), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize(("kind", "support", "correction"), OFFERED)
@pytest.mark.parametrize("top_k", [1, K])
def test_every_support_is_at_rest_where_student_equals_teacher(kind, support, correction, top_k):
    hidden, _, weight = states(2)
    loss = divergence(
        hidden,
        hidden.detach().clone(),
        Head(weight),
        kind=kind,
        alpha=0.3,
        top_k=top_k,
        support=support,
        correction=correction,
    )
    for gradient in torch.autograd.grad(loss.total, [hidden, weight]):
        close(gradient, torch.zeros_like(gradient), 1e-6)


@pytest.mark.parametrize("correction", ["tail", "renormalise", "stopgrad"])
def test_an_empty_intersection_contributes_nothing(correction):
    # The student is sure of the first token, the teacher of the second.
    student_hidden = torch.tensor([[5.0, -5.0, 0.0]], requires_grad=True)
    teacher_hidden = torch.tensor([[-5.0, 5.0, 0.0]])
    loss = divergence(
        student_hidden,
        teacher_hidden,
        Head(torch.eye(3)),
        top_k=1,
        support="intersection",
        correction=correction,
    )
    loss.total.backward()
    assert loss.per_token.item() == 0.0
    close(student_hidden.grad, torch.zeros_like(student_hidden), 1e-6)


@pytest.mark.parametrize("correction", ["tail", "renormalise"])
@pytest.mark.parametrize("top_k", [None, K])
def test_js_over_alpha_tends_to_the_forward_kl(correction, top_k):
    student_hidden, teacher_hidden, weight = states(3)

    def per_token(kind: DivergenceKind, alpha: float) -> Tensor:
        # Probabilities that are not too far apart: the limit is reached where alpha q is small against pi.
        settings = {"top_k": top_k, "correction": correction}
        return divergence(
            student_hidden, teacher_hidden, Head(0.3 * weight), kind=kind, alpha=alpha, **settings
        ).per_token

    forward = per_token("forward_kl", 0.5)
    errors = [float((per_token("js", alpha) / alpha - forward).abs().max()) for alpha in (0.1, 0.01, 0.001)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01 * float(forward.max())


@pytest.mark.parametrize(("kind", "support", "correction"), OFFERED)
def test_sure_and_opposite_sides_stay_finite(kind, support, correction):
    hidden = torch.tensor([[300.0, -300.0, 0.0, 1.0]], requires_grad=True)
    loss = divergence(
        hidden,
        torch.tensor([[-300.0, 300.0, 1.0, 0.0]]),
        Head(torch.eye(4)),
        kind=kind,
        top_k=2,
        support=support,
        correction=correction,
    )
    loss.total.backward()
    assert loss.per_token.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 3, "support": "teacher"}, "support must be one of student, intersection"),
        ({"top_k": 3, "correction": "none"}, "correction one of tail, renormalise, stopgrad"),
        ({"top_k": 3, "correction": "stopgrad", "kind": "js"}, "stopgrad.* is for reverse_kl, not js"),
    ],
)
def test_what_is_not_offered_is_refused(settings, message):
    student_hidden, teacher_hidden, weight = states()
    with pytest.raises(ValueError, match=message):
        divergence(student_hidden, teacher_hidden, Head(weight), **settings)
