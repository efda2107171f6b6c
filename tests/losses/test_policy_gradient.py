"""Expectations over a small vocabulary are enumerated, not sampled."""

from __future__ import annotations

import pytest
import torch
from dense import close

from vpd.losses import clipped_policy_gradient, sampled_divergence

V = 7


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher, old = (torch.randn(V, generator=generator, dtype=torch.float64) for _ in range(3))
    return student.requires_grad_(), teacher, student.detach() + 0.5 * old


def exact_gradient(student, teacher):
    pi, log_q = student.softmax(0), teacher.log_softmax(0)
    return torch.autograd.grad((pi * (pi.log() - log_q)).sum(), student)[0]


def gradients_of_each_token(student, teacher, old=None, control_variate=False, **settings):
    """[V, V], the gradient that each token would give if it were the one drawn."""
    log_pi, log_q = student.log_softmax(0), teacher.log_softmax(0)
    kl = (log_pi.exp() * (log_pi - log_q)).sum().detach()
    rows = []
    for token in range(V):
        loss = sampled_divergence(
            log_pi[token][None],
            log_q[token][None],
            torch.ones(1),
            old_log_probs=None if old is None else old.log_softmax(0)[token][None],
            baseline=kl[None] if control_variate else None,
            **settings,
        )
        rows.append(torch.autograd.grad(loss, student, retain_graph=True)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_expected_gradient_is_the_exact_one(logits, control_variate, off_policy):
    student, teacher, old = logits
    drawn_from = (old if off_policy else student).detach().softmax(0)
    gradients = gradients_of_each_token(student, teacher, old if off_policy else None, control_variate)
    close((drawn_from[:, None] * gradients).sum(0), exact_gradient(student, teacher))


def test_without_the_ratio_an_old_policy_gives_another_gradient(logits):
    student, teacher, old = logits
    gradients = gradients_of_each_token(student, teacher)
    wrong = (old.softmax(0)[:, None] * gradients).sum(0)
    assert (wrong - exact_gradient(student, teacher)).abs().max() > 0.01


def test_the_control_variate_usually_lowers_the_variance():
    ratios = []
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = (2.0 * torch.randn(V, generator=generator, dtype=torch.float64) for _ in range(2))
        student.requires_grad_()
        pi, exact = student.detach().softmax(0), exact_gradient(student, teacher)
        plain, controlled = (
            float((pi[:, None] * (gradients_of_each_token(student, teacher, None, on) - exact) ** 2).sum())
            for on in (False, True)
        )
        ratios.append(controlled / plain)
    assert sorted(ratios)[15] < 0.85


def test_an_importance_clip_bounds_the_weight(logits):
    student, teacher, _ = logits
    far = student.detach() + torch.linspace(-4, 4, V)
    free, clipped = (gradients_of_each_token(student, teacher, far, importance_clip=clip) for clip in (None, 1.5))
    ratio = (student.log_softmax(0) - far.log_softmax(0)).exp().detach()
    assert ratio.min() < 1.0 < 1.5 < ratio.max()
    close(clipped, free * (ratio.clamp(max=1.5) / ratio)[:, None])


def ratios_and_gradients(advantage, **settings):
    old = torch.log(torch.tensor([0.5, 0.7, 0.9, 1.0, 1.2, 1.4, 2.0])).neg()
    log_probs = torch.zeros(7, requires_grad=True)
    loss = clipped_policy_gradient(log_probs, torch.full((7,), advantage), old, torch.full((7,), 0.5), **settings)
    return loss, torch.autograd.grad(loss, log_probs)[0]


def test_the_ratio_stops_counting_where_it_has_gone_far_enough():
    ratios = torch.tensor([0.5, 0.7, 0.9, 1.0, 1.2, 1.4, 2.0])
    _, rising = ratios_and_gradients(2.0)
    close(rising, -0.5 * 2.0 * ratios * (ratios < 1.28))
    _, falling = ratios_and_gradients(-2.0)
    close(falling, 0.5 * 2.0 * ratios * (ratios > 0.8))
    loss, free = ratios_and_gradients(2.0, clip_low=None, clip_high=None)
    close(free, -ratios)
    close(loss, -ratios.sum())


def test_one_sided_bounds():
    _, gradient = ratios_and_gradients(2.0, clip_low=None)
    assert (gradient == 0).tolist() == [False] * 5 + [True] * 2
    _, gradient = ratios_and_gradients(-2.0, clip_high=None)
    assert (gradient == 0).tolist() == [True] * 2 + [False] * 5
