"""The teacher's adapter is seen by the teacher, trained by the E-step, and left out of the saved student."""

from __future__ import annotations

import pytest
import torch
from engines import generate
from toy import toy_trainer

from vpd import ConfigError
from vpd.algorithms import vpd
from vpd.algorithms.e_step import refine_teacher
from vpd.algorithms.example import make_examples, student_view, teacher_view, with_teacher
from vpd.policy.adapter import TEACHER
from vpd.policy.load import load_policy

LORA = {"type": "vpd", "e_step_every": 1, "teacher": "lora", "teacher_lora": {"r": 2}}


def case(tmp_path, **algorithm):
    trainer = toy_trainer(tmp_path, algorithm={**LORA, **algorithm})
    trainer.sampler.engine.sync()
    batch = trainer.with_feedback(trainer.sample(1))
    return trainer, with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))


def split(trainer):
    """The adapter's weights, and those that the student has."""
    own, shared = {}, {}
    for name, parameter in trainer.learner.module.named_parameters():
        (own if f".{TEACHER}." in name else shared)[name] = parameter.detach().clone()
    assert own
    assert shared
    return own, shared


def stir(trainer):
    """Make the adapter do something; a new one does nothing."""
    with torch.no_grad():
        for name, parameter in trainer.learner.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_the_e_step_trains_the_adapter_alone_and_the_m_step_all_but_it(tmp_path):
    trainer, examples = case(tmp_path)
    own, shared = split(trainer)
    refine_teacher(trainer.learner, examples, trainer.args.algorithm, 2)
    after_e = split(trainer)
    assert any(not torch.equal(own[name], value) for name, value in after_e[0].items())
    assert all(torch.equal(shared[name], value) for name, value in after_e[1].items())
    vpd.distil(trainer.learner, examples, trainer.args.algorithm, 2, torch.full((len(examples),), 0.1))
    after_m = split(trainer)
    assert all(torch.equal(after_e[0][name], value) for name, value in after_m[0].items())
    assert any(not torch.equal(shared[name], value) for name, value in after_m[1].items())
    assert all(p.requires_grad for p in trainer.learner.module.parameters())


def test_the_student_never_sees_the_adapter_and_the_teacher_does(tmp_path):
    trainer, examples = case(tmp_path)
    learner = trainer.learner
    before = [learner.sequence_log_probs(examples, view) for view in (student_view, teacher_view)]
    stir(trainer)
    after = [learner.sequence_log_probs(examples, view) for view in (student_view, teacher_view)]
    torch.testing.assert_close(after[0], before[0])
    assert (after[1] - before[1]).abs().min() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_e_steps_gradient_is_that_of_the_adapted_network(tmp_path, checkpointing):
    """A checkpointed layer runs a second time in the backward pass, and must find the adapter as it was."""
    gradients = {}
    for name, settings in {"plain": {}, "checked": {"gradient_checkpointing": checkpointing}}.items():
        trainer = toy_trainer(tmp_path / name, algorithm=LORA, model={"autocast": "none", **settings})
        torch.manual_seed(0)
        stir(trainer)
        trainer.sampler.engine.sync()
        batch = trainer.with_feedback(trainer.sample(1))
        examples = with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))
        trainer.args.optim.max_grad_norm = trainer.learner.settings.max_grad_norm = 1e9
        trainer.learner.optimizer.param_groups[0]["lr"] = 0.0
        gradients[name] = refine_teacher(trainer.learner, examples, trainer.args.algorithm, 2).metrics["e_grad_norm"]
    assert gradients["plain"] > 0
    assert gradients["checked"] == pytest.approx(gradients["plain"], rel=1e-4)


def test_rollouts_are_the_students_and_the_gap_is_measured_with_the_teacher(tmp_path):
    trainer, _ = case(tmp_path)
    prompts = [[5, 6, 7], [8, 9]]
    settings = {"max_new_tokens": 8, "eos_token_ids": (), "temperature": 0.0}

    def sampled(**which):
        return [s.token_ids for (s,) in generate(trainer.sampler.engine, prompts, **which, **settings)]

    plain = sampled()
    with torch.no_grad():
        for name, parameter in trainer.learner.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=5.0)
    trainer.sampler.engine.sync()
    assert sampled() == plain
    assert sampled(as_teacher=True) != plain
    assert sampled() == plain


def test_a_run_saves_the_student_and_goes_on_with_the_adapter(tmp_path):
    trainer = toy_trainer(tmp_path / "whole", algorithm=LORA, run={"max_steps": 3, "save_steps": 1})
    trainer.train()
    _, shared = split(trainer)
    saved = load_policy(str(tmp_path / "whole" / "model")).model.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in saved)
    weight = shared["model.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
    torch.testing.assert_close(saved["model.layers.0.mlp.up_proj.weight"], weight)

    toy_trainer(tmp_path / "cut", algorithm=LORA, run={"max_steps": 2, "save_steps": 1}).train()
    resumed = toy_trainer(tmp_path / "cut", algorithm=LORA, run={"max_steps": 3, "save_steps": 1})
    resumed.train(resume_from_checkpoint=True)
    for ours, theirs in zip(split(trainer), split(resumed), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_best_weights_come_back_into_the_wrapped_network(tmp_path):
    trainer, _ = case(tmp_path)
    _, shared = split(trainer)
    trainer.checkpoints.keep_best()
    with torch.no_grad():
        for parameter in trainer.learner.module.parameters():
            parameter.add_(1.0)
    trainer.checkpoints.load_best()
    assert all(torch.equal(shared[name], value) for name, value in split(trainer)[1].items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": {"type": "sdpo", "teacher": "lora"}}, "trained by E-steps"),
        ({"algorithm": {"type": "joint", "teacher": "lora"}}, "trained by E-steps"),
        ({"algorithm": LORA, "model": {"autocast": "none", "lora": {"r": 2}}}, "leave model.lora out"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, **sections)
