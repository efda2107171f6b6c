"""Extrapolation (EffOPD) tries the right weights, keeps the best, and forgets the moments."""

from __future__ import annotations

import pytest
import torch
from toy import toy_trainer

from vpd.algorithms.extrapolation import extrapolate, is_due
from vpd.policy.copies import PREVIOUS
from vpd.runs.folder import read_metrics

NAME = "model.model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def moved(tmp_path):
    """A trainer after one update, and its weights before and after it."""
    trainer = toy_trainer(tmp_path, optim={"extrapolation": True})
    trainer.learner.copies[PREVIOUS].assign(trainer.learner.module)
    weight = dict(trainer.learner.module.named_parameters())[NAME]
    before = weight.detach().clone()
    trainer.sampler.engine.sync()
    trainer.update(trainer.with_feedback(trainer.sample(1)), 1)
    return trainer, weight, before, weight.detach().clone()


@pytest.mark.parametrize(
    ("scores", "kept", "tried"),
    [
        ([0.5, 0.6, 0.7, 0.7, 0.9, 1.0], 2, 3),
        ([0.5, 0.5], 0, 1),
        ([0.5, float("nan"), 0.9], 0, 1),
        ([0.5, 0.4, 0.9], 0, 1),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 5, 5),
    ],
)
def test_it_goes_on_while_the_score_rises_strictly(moved, scores, kept, tried):
    trainer, weight, before, after = moved
    left, places = list(scores), []

    def score():
        places.append(weight.detach().clone())
        return left.pop(0)

    metrics = extrapolate(trainer.learner, score)
    assert metrics["extrapolation"] == kept
    assert metrics["extrapolation_score_after"] == max(score for score in scores[: tried + 1] if score == score)
    for k, place in enumerate(places):
        torch.testing.assert_close(place, after + 2 * k * (after - before))
    assert len(places) == tried + 1
    torch.testing.assert_close(weight.detach(), after + 2 * kept * (after - before))
    assert (len(trainer.learner.optimizer.state) == 0) == (kept > 0)
    previous = trainer.learner.copies[PREVIOUS].trained(trainer.learner.copies[PREVIOUS].module)[NAME]
    torch.testing.assert_close(previous, weight)


def test_powers_of_two_are_due():
    assert [step for step in range(1, 20) if is_due(step)] == [1, 2, 4, 8, 16]


def test_a_run_tries_it_and_repeats_through_a_resume(tmp_path):
    optim = {"extrapolation": True, "extrapolation_tasks": 4}
    toy_trainer(tmp_path / "whole", run={"max_steps": 4, "save_steps": 3}, optim=optim).train()
    toy_trainer(tmp_path / "cut", run={"max_steps": 3, "save_steps": 3}, optim=optim).train()
    toy_trainer(tmp_path / "cut", run={"max_steps": 4, "save_steps": 3}, optim=optim).train(resume_from_checkpoint=True)
    whole, cut = (
        [line for line in read_metrics(tmp_path / name) if line["event"] == "train"] for name in ("whole", "cut")
    )
    assert [line["step"] for line in whole if "extrapolation" in line] == [1, 2, 4]
    names = ("m_loss", "extrapolation", "extrapolation_score_before", "extrapolation_score_after")
    assert [whole[-1][name] for name in names] == [cut[-1][name] for name in names]
    assert whole[0]["seconds_extrapolation"] > 0
