"""AdamW's moments, made before its first step."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer

from vpd import VPDTrainer
from vpd.config import OptimSettings
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


def test_a_trainer_has_them_before_it_steps_unless_the_optimizer_is_given(tmp_path):
    own = toy_trainer(tmp_path / "own")
    assert all(own.learner.optimizer.state[weight] for weight in own.model.parameters())
    model = toy_model()
    given = VPDTrainer(
        model=model,
        args=toy_config(tmp_path / "given"),
        environment=ToyEnvironment(),
        processing_class=tokenizer(),
        optimizers=(torch.optim.AdamW(model.parameters()), None),
    )
    assert not given.learner.optimizer.state
