"""The E-step and the M-step change what they should, and leave the rest alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import toy_trainer

from vpd.algorithms import ExampleBatch, VPDSettings, vpd
from vpd.algorithms.e_step import refine_teacher
from vpd.algorithms.example import make_examples, student_view, teacher_view, with_teacher
from vpd.algorithms.minibatches import Counts, split_by_prompts, token_weights
from vpd.config import MStepSettings
from vpd.evaluation import measure_gap
from vpd.losses import measure_margin
from vpd.packing import pack
from vpd.policy.objectives import Distil, ReadStates, Refine, ScoredStates


def examples_of(trainer, step, split="train"):
    tasks = trainer.curriculum.tasks_of_step(step) if split == "train" else list(trainer.environment.tasks(split))
    batch = trainer.with_feedback(trainer.sampler.sample(tasks, 4, seed=step))
    return with_teacher(make_examples(batch.rollouts, batch.is_success, batch.views))


def gradients(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_the_m_step_sends_no_gradient_through_the_teacher(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    examples = examples_of(trainer, 1)
    module, learner = trainer.learner.module, trainer.learner
    teacher = module(learner.pack(examples, teacher_view), ReadStates()).values
    weights = token_weights(examples, "token_mean", Counts(10, len(examples)))

    def student_gradients(teacher_hidden):
        trainer.model.zero_grad()
        objective = Distil(ScoredStates(teacher_hidden, teacher["rows"]), weights, MStepSettings(), 1.0)
        module(learner.pack(examples, student_view), objective).loss.backward()
        return gradients(trainer)

    # With the graph of the teacher's pass still attached, the gradient is that of a constant teacher.
    assert teacher["hidden"].requires_grad
    attached, detached = student_gradients(teacher["hidden"]), student_gradients(teacher["hidden"].detach())
    assert attached
    assert all(torch.equal(attached[name], value) for name, value in detached.items())


def test_the_e_step_sends_no_gradient_through_the_prior_and_only_the_teacher_prompt_is_run_with_gradient(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    examples = examples_of(trainer, 1)
    learner = trainer.learner
    prior = learner.sequence_log_probs(examples, student_view)
    assert not prior.requires_grad
    with_gradient = []
    trainer.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: with_gradient.append(inputs[0].numel()) if torch.is_grad_enabled() else None
    )
    refine_teacher(learner, examples, trainer.args.algorithm, 2)
    turns = [turn for example in examples for turn in teacher_view(example)]
    teacher_tokens = pack(*zip(*turns, strict=True)).input_ids.numel()
    assert with_gradient == [teacher_tokens]


def test_the_e_loss_is_the_bco_loss_of_the_implicit_rewards(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    examples = examples_of(trainer, 1)
    learner = trainer.learner
    is_success = torch.tensor([e.is_success for e in examples])
    assert 0 < is_success.sum() < len(examples)
    prior = learner.sequence_log_probs(examples, student_view)
    rewards = 0.1 * (learner.sequence_log_probs(examples, teacher_view) - prior)
    shift = 0.5 * (rewards[is_success].mean() + rewards[~is_success].mean())
    by_hand = (
        -(rewards[is_success] - shift).sigmoid().log().mean() - (shift - rewards[~is_success]).sigmoid().log().mean()
    )
    betas = torch.full((len(examples),), 0.1)
    objective = Refine(prior, is_success, float(shift), int(is_success.sum()), int((~is_success).sum()), betas, 1.0)
    loss = learner.module(learner.pack(examples, teacher_view), objective).loss
    torch.testing.assert_close(loss.float(), by_hand, rtol=1e-4, atol=1e-5)
    assert abs(measure_margin(learner.total, rewards, is_success).reward_shift - float(shift)) < 1e-6


def test_an_e_step_in_one_pass_equals_one_in_several(tmp_path):
    found, passes = {}, {}
    for name, budget in (("one", 4096), ("several", 300)):
        trainer = toy_trainer(tmp_path / name, optim={"micro_batch_tokens": budget}, algorithm={"e_epochs": 2})
        learner, examples = trainer.learner, examples_of(trainer, 1)
        score, counted = learner.score, []
        learner.score = lambda *args, score=score, counted=counted: (counted.append(None), score(*args))[1]
        result = trainer.algorithm.update(learner, ExampleBatch(examples, 1, 2))
        found[name] = (result.metrics, [p.detach().clone() for p in trainer.model.parameters()])
        passes[name] = (len(counted), len(learner.micro_batches(examples, teacher_view)))
    assert passes["one"] == (0, 1), "prior and M-step's teacher are read within the passes of teacher and student"
    assert passes["several"][1] > 1
    one, several = found["one"][0], found["several"][0]
    for key in ("e_loss", "reward_shift", "margin_before", "margin_after", "e_weight_success", "misranked_share"):
        assert one[key] == pytest.approx(several[key], rel=1e-4, abs=1e-6), key
    for left, right in zip(found["one"][1], found["several"][1], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("minibatch", [None, 1])
def test_the_margin_after_an_e_step_is_that_of_the_refined_teacher(tmp_path, monkeypatch, minibatch):
    algorithm = {"m_minibatch_prompts": minibatch, "e_learning_rate_factor": 3.0}
    trainer = toy_trainer(tmp_path, algorithm=algorithm)
    learner, examples = trainer.learner, examples_of(trainer, 1)
    is_success = torch.tensor([example.is_success for example in examples])
    prior = learner.sequence_log_probs(examples, student_view)
    refined, actual = [], vpd.distil

    def distil(*args, **kwargs):
        refined.append(learner.sequence_log_probs(examples, teacher_view))
        return actual(*args, **kwargs)

    monkeypatch.setattr(vpd, "distil", distil)
    metrics = trainer.algorithm.update(learner, ExampleBatch(examples, 1, 2)).metrics
    expected = measure_margin(learner.total, 0.1 * (refined[0] - prior), is_success).margin
    assert metrics["margin_after"] == pytest.approx(expected, rel=1e-4)
    assert abs(metrics["margin_after"] - metrics["margin_before"]) > 1e-4


def test_dropout_keeps_the_shift_out_of_the_training_pass(tmp_path):
    trainer = toy_trainer(tmp_path)
    examples = examples_of(trainer, 1)
    plain = refine_teacher(trainer.learner, examples, VPDSettings(e_learning_rate_factor=0.0), 2).metrics
    # So much that the loss of a random model shows it, whatever is drawn.
    trainer.model.config.attention_dropout = 0.9
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    dropped = refine_teacher(trainer.learner, examples, VPDSettings(e_learning_rate_factor=0.0), 2).metrics
    assert dropped["reward_shift"] == pytest.approx(plain["reward_shift"], rel=1e-4)
    assert dropped["e_loss"] != pytest.approx(plain["e_loss"], rel=1e-4)


def test_e_steps_alone_raise_the_margin_on_fresh_rollouts_and_do_not_spoil_the_teacher(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    learner, settings = trainer.learner, trainer.args.algorithm
    fresh = examples_of(trainer, 99, split="selection")
    is_success = torch.tensor([e.is_success for e in fresh])
    prior = learner.sequence_log_probs(fresh, student_view)
    selection = trainer.environment.tasks("selection")

    def margin():
        rewards = settings.bco_beta * (learner.sequence_log_probs(fresh, teacher_view) - prior)
        return measure_margin(learner.total, rewards, is_success).margin

    before, gap_before = margin(), measure_gap(trainer.sampler, selection, 4, 1.0, seed=5)
    for step in range(1, 9):
        metrics = refine_teacher(learner, examples_of(trainer, step), settings, 2).metrics
        assert metrics["e_step"] == 1
        trainer.sampler.engine.sync()
    after, gap_after = margin(), measure_gap(trainer.sampler, selection, 4, 1.0, seed=5)
    # Completions have about three tokens and beta is 0.1, so that margins are small.
    assert after > before + 0.004
    assert gap_after.teacher_accuracy >= gap_before.teacher_accuracy


def test_a_batch_of_one_class_skips_the_e_step(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    failures = [e for e in examples_of(trainer, 1) if not e.is_success]
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}

    # A learning rate of 0 leaves the M-step without effect.
    trainer.learner.optimizer.param_groups[0]["lr"] = 0.0
    result = trainer.algorithm.update(trainer.learner, ExampleBatch(failures, 1, 2))
    assert not trainer.algorithm.wants_fresh(trainer.learner, ExampleBatch(failures, 1, 2))
    assert trainer.algorithm.wants_fresh(trainer.learner, ExampleBatch(examples_of(trainer, 1), 1, 2))
    assert not trainer.algorithm.wants_fresh(trainer.learner, ExampleBatch(examples_of(trainer, 1), 2, 2))
    assert result.metrics["e_step"] == 0
    assert "e_loss" not in result.metrics
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_the_e_steps_learning_rate_factor_holds_for_what_momentum_keeps_of_it(tmp_path):
    kept, moved = {}, {}
    for factor in (0.5, 1.0):
        trainer = toy_trainer(tmp_path / str(factor), algorithm={"e_learning_rate_factor": factor})
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        refine_teacher(trainer.learner, examples_of(trainer, 1), trainer.args.algorithm, 2)
        states = trainer.learner.optimizer.optimizer.state
        kept[factor] = torch.cat([states[p]["exp_avg"].flatten() for p in trainer.model.parameters()])
        moved[factor] = max(
            float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()
        )
    torch.testing.assert_close(kept[0.5], 0.5 * kept[1.0])
    # Adam's first step has the learning rate's length, whatever the gradient's.
    assert moved[0.5] == pytest.approx(0.5 * moved[1.0], rel=1e-2)


def test_margins_are_told_apart_by_source(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    examples = examples_of(trainer, 1)
    examples = [replace(e, source="sibling" if e.group else "environment") for e in examples]
    metrics = refine_teacher(trainer.learner, examples, trainer.args.algorithm, 2, fresh=examples).metrics
    for when in ("margin_before", "margin_after", "margin_fresh_before", "margin_fresh_after"):
        by_source = [metrics[f"{when}_environment"], metrics[f"{when}_sibling"]]
        assert by_source[0] != by_source[1]
        # The rollouts that are called fresh here are the batch's own, so that the margins must agree.
        assert metrics[when] == pytest.approx(metrics[when.replace("_fresh", "")], abs=1e-6)


def test_minibatches_count_prompts_with_all_their_rollouts(tmp_path):
    trainer = toy_trainer(tmp_path / "run")
    examples = examples_of(trainer, 1)
    parts = split_by_prompts(examples, 1, 2)
    assert [{e.group for e in part} for part in parts] == [{0}, {1}]
    assert split_by_prompts(examples, None, 2) == [examples]


def test_aggregations_weigh_tokens_as_they_say(tmp_path):
    examples = examples_of(toy_trainer(tmp_path / "run"), 1)
    tokens = sum(len(e.completion) for e in examples)
    assert torch.allclose(token_weights(examples, "token_mean", Counts(tokens, 8)), torch.full((tokens,), 1 / tokens))
    by_sequence = token_weights(examples, "sequence_mean", Counts(tokens, len(examples))).split(
        [len(e.completion) for e in examples]
    )
    assert all(torch.isclose(part.sum(), torch.tensor(1 / len(examples))) for part in by_sequence)
    assert torch.equal(token_weights(examples, "sum", Counts(tokens, 8)), torch.ones(tokens))
