"""The E-step's loss against numbers worked out by hand, and its sums over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from vpd.losses import bco_loss, implicit_rewards


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_equals_the_hand_computed_value_and_gradient():
    rewards = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    loss = bco_loss(rewards, torch.tensor([True, False, True]), 0.25)
    loss.backward()

    expected = -(math.log(sigmoid(1.75)) + math.log(sigmoid(0.25))) / 2 - math.log(sigmoid(1.25))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # d/dr of -log sigmoid(r - delta) is -(1 - sigmoid(r - delta)); a failure's has the other sign.
    gradient = [-(1 - sigmoid(1.75)) / 2, 1 - sigmoid(1.25), -(1 - sigmoid(0.25)) / 2]
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx(gradient, rel=1e-5)


def test_micro_batches_with_global_counts_add_up_to_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(10, generator=generator, requires_grad=True)
    # Micro-batches: mixed, failures only, none, successes only.
    is_success = torch.tensor([True, False, True, False, False, False, False, True, True, True])
    whole = bco_loss(rewards, is_success, 0.1)
    (whole_gradient,) = torch.autograd.grad(whole, rewards)

    parts = [
        bco_loss(rewards[rows], is_success[rows], 0.1, success_count=5, failure_count=5)
        for rows in (slice(0, 3), slice(3, 7), slice(7, 7), slice(7, 10))
    ]
    (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), rewards)

    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    torch.testing.assert_close(gradient, whole_gradient)


@pytest.mark.parametrize(("is_success", "sign"), [(True, 1.0), (False, -1.0)])
def test_an_absent_class_contributes_nothing(is_success, sign):
    loss = bco_loss(torch.tensor([1.0, 3.0]), torch.tensor([is_success] * 2), torch.tensor(1.0))
    expected = -(math.log(sigmoid(0.0)) + math.log(sigmoid(sign * 2.0))) / 2

    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_without_rows_the_loss_is_a_zero_that_backward_accepts():
    rewards = torch.zeros(0, requires_grad=True)
    loss = bco_loss(rewards, torch.zeros(0, dtype=torch.bool), 0.0)
    loss.backward()

    assert loss.item() == 0.0
    assert rewards.grad is not None


def test_extreme_implicit_rewards_stay_finite():
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bco_loss(rewards, torch.tensor([True, False]), 0.0)
    loss.backward()

    assert loss.item() == pytest.approx(2e4)
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-1.0, 1.0]


def test_the_loss_sends_no_gradient_to_the_shift():
    rewards, shift = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    bco_loss(rewards, torch.tensor([True, False]), shift).backward()

    assert shift.grad is None


def test_implicit_rewards_scale_the_log_ratio_and_hold_the_prior_constant():
    teacher = torch.tensor([-10.0, -20.0], requires_grad=True)
    prior = torch.tensor([-12.0, -15.0], requires_grad=True)
    rewards = implicit_rewards(teacher, prior, torch.tensor([0.1, 0.2]))
    rewards.sum().backward()

    assert rewards.tolist() == pytest.approx([0.2, -1.0])
    assert teacher.grad is not None
    assert teacher.grad.tolist() == pytest.approx([0.1, 0.2])
    assert prior.grad is None


@pytest.mark.parametrize(
    ("is_success", "counts", "message"),
    [
        (torch.tensor([True, False]), {"success_count": 0}, "more than the global counts"),
        (torch.tensor([1, 0]), {}, "bool tensor of the same shape"),
        (torch.tensor([True]), {}, "bool tensor of the same shape"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(is_success, counts, message):
    with pytest.raises(ValueError, match=message):
        bco_loss(torch.zeros(2), is_success, 0.0, **counts)
