"""AdamW's moments are made before its first step, and are those that the step would make."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from toy import toy_trainer

from vpd.config import OptimSettings
from vpd.policy.learner import TrainingPass, View
from vpd.policy.objectives import Imitate
from vpd.policy.optimizer import make_moments, make_optimizer


@pytest.fixture
def weights():
    return [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3, 4).t())]


def test_steps_are_those_of_moments_that_the_first_step_makes(weights):
    lazy = copy.deepcopy(weights)
    optimizers = [make_optimizer(OptimSettings(weight_decay=0.1), side) for side in (weights, lazy)]
    make_moments(optimizers[0])
    for _ in range(3):
        for left, right in zip(weights, lazy, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(weights, lazy, rtol=0, atol=0)
    for left, right in zip(weights, lazy, strict=True):
        ours, theirs = (optimizer.state[side] for optimizer, side in zip(optimizers, (left, right), strict=True))
        assert {name: (value.dtype, value.stride()) for name, value in ours.items()} == {
            name: (value.dtype, value.stride()) for name, value in theirs.items()
        }


def test_moments_that_are_there_stay(weights):
    optimizer = make_optimizer(OptimSettings(), weights)
    weights[0].grad = torch.ones(4, 3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[weights[0]])
    make_moments(optimizer)
    torch.testing.assert_close(optimizer.state[weights[0]], before)
    assert optimizer.state[weights[1]]["exp_avg"].shape == (4, 3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, partial(torch.optim.AdamW, amsgrad=True)])
def test_other_optimizers_make_their_own(weights, kind):
    optimizer = kind(weights, lr=1e-3)
    make_moments(optimizer)
    assert not any(optimizer.state.values())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_they_are_there_when_the_first_pass_begins(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    learner, seen = trainer.learner, []

    def make_pass(part):
        seen.append(all(learner.optimizer.state[weight] for weight in trainer.model.parameters()))
        return TrainingPass(learner.pack(part, View(lambda ids: [(ids, 1)])), Imitate(2))

    assert not learner.optimizer.state
    learner.optimise([[[5, 6, 7]]], make_pass)
    assert seen == [True]
