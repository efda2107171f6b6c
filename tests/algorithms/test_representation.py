"""The distance between matched hidden states has the right value, gradient and layers."""

from __future__ import annotations

import pytest
import torch
from toy import toy_trainer

from vpd import ConfigError
from vpd.algorithms.example import make_examples, student_view, teacher_view, with_teacher
from vpd.algorithms.m_step import distilling, pack_both
from vpd.algorithms.minibatches import Counts
from vpd.algorithms.teacher import make_teacher
from vpd.runs.folder import read_metrics


def case(tmp_path, **settings):
    algorithm = {"type": "sdpo", "teacher": "live", **settings}
    trainer = toy_trainer(tmp_path, algorithm=algorithm)
    trainer.sampler.engine.sync()
    batch = trainer.with_feedback(trainer.sample(1))
    return trainer, with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))


def separate_states(trainer, sequence, layers):
    """[L, T, H] of one sequence in a pass of its own."""
    output = trainer.model(input_ids=torch.tensor([sequence]), output_hidden_states=True)
    return torch.stack([output.hidden_states[layer][0] for layer in layers])


def loss_of(trainer, examples):
    settings = trainer.args.algorithm
    tokens = sum(len(example.completion) for example in examples)
    batch, conditioned = pack_both(trainer.learner, examples, examples, make_teacher(settings))
    objective = distilling(trainer.learner, examples, settings, Counts(tokens, len(examples)), None)
    return trainer.learner.policy(batch, objective, conditioned).loss


@pytest.mark.parametrize(("layers", "chosen"), [(None, [1, 2]), ([1], [1]), ([2], [2])])
def test_it_is_the_mean_squared_distance_at_the_same_completion_tokens(tmp_path, layers, chosen):
    trainer, examples = case(tmp_path / "with", representation_weight=3.0, representation_layers=layers)
    trainer.learner.policy.eval()
    distance = tokens = 0.0
    for example in examples:
        pairs = []
        for view in (student_view, teacher_view):
            ((sequence, start),) = view(example)
            states = separate_states(trainer, sequence, chosen)[:, start - 1 : -1]
            pairs.append(states if view is student_view else states.detach())
        distance = distance + (pairs[0] - pairs[1]).square().mean(dim=(0, 2)).sum()
        tokens += len(example.completion)
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    (expected,) = torch.autograd.grad(3.0 * distance / tokens, weight)

    together = loss_of(trainer, examples)
    (gradient,) = torch.autograd.grad(together, weight)
    trainer.args.algorithm.representation_weight = 0.0
    alone = loss_of(trainer, examples)
    (without,) = torch.autograd.grad(alone, weight)
    torch.testing.assert_close(together - alone, 3.0 * distance / tokens, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient - without, expected, rtol=1e-3, atol=1e-6)


def test_a_run_reports_it(tmp_path):
    algorithm = {"type": "vpd", "representation_weight": 1.0}
    toy_trainer(tmp_path, run={"max_steps": 1}, algorithm=algorithm).train()
    (line,) = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    assert line["representation"] > 0


def test_the_joint_loss_has_it_too(tmp_path):
    algorithm = {"type": "joint", "representation_weight": 1.0, "teacher": "live"}
    toy_trainer(tmp_path / "with", run={"max_steps": 1}, algorithm=algorithm).train()
    toy_trainer(tmp_path / "without", run={"max_steps": 1}, algorithm={"type": "joint", "teacher": "live"}).train()
    first, second = (
        next(line for line in read_metrics(tmp_path / name) if line["event"] == "train") for name in ("with", "without")
    )
    assert first["m_loss"] > second["m_loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation_weight": 1.0, "representation_layers": [3]}, "names 3, but the model has 2 layers"),
        ({"representation_weight": 1.0, "teacher": "trust_region"}, "representation_weight needs one network"),
        ({"representation_layers": [1]}, "does nothing without algorithm.representation_weight"),
    ],
)
def test_what_cannot_be_matched_is_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, algorithm={"type": "vpd", **settings})
