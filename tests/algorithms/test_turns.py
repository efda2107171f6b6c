"""Losses over several turns sum over the right tokens, and a turn without a teacher stays out of the M-step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import toy_trainer

from vpd.algorithms import ExampleBatch, GRPOSettings, JointSettings, SDPOSettings
from vpd.algorithms.e_step import refine_teacher
from vpd.algorithms.example import Example, ExampleTurn, make_examples, student_view, teacher_view, with_teacher
from vpd.algorithms.minibatches import Counts, token_weights
from vpd.algorithms.policy_step import group_advantages
from vpd.config import algorithm_class
from vpd.types import Rollout, Task, TeacherPrompt, TeacherView, Turn, Verdict


def conversations(rewrites: bool = False, untaught: int | None = None) -> list[Example]:
    """Two groups of four conversations of two turns; a prompt begins with the turn before, unless it is rewritten."""
    generator = torch.Generator().manual_seed(3)

    def draw(count):
        return torch.randint(5, 200, (count,), generator=generator).tolist()

    rollouts, views = [], []
    for group in range(2):
        question, hint = draw(9), draw(6)
        for index in range(4):
            first, reply, second = draw(3 + index), draw(4), draw(2 + index)
            history = question if rewrites else [*question, *first]
            turns = [
                Turn(question, first, [0.0] * len(first), False, "first"),
                Turn([*history, *reply], second, [0.0] * len(second), False, "second"),
            ]
            prompts = [TeacherPrompt([*turn.prompt_ids, *hint], "") for turn in turns]
            views.append(TeacherView([None if i == untaught else p for i, p in enumerate(prompts)], "environment"))
            rollouts.append(Rollout(Task("t", []), group, turns, Verdict(float(index % 2))))
    return make_examples(rollouts, [bool(r.verdict.reward) for r in rollouts], views)


@pytest.fixture
def trainer(tmp_path):
    return toy_trainer(tmp_path / "run", optim={"max_grad_norm": 1e9})


def log_probs(trainer, prompt, completion):
    logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def sum_over_turns(trainer, example, of_teacher):
    return sum(
        log_probs(trainer, turn.teacher_prompt if of_teacher else turn.student_prompt, turn.completion).sum()
        for turn in example.turns
    )


def update(trainer, examples, settings):
    found = {}

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    step, trainer.learner.optimizer.step = trainer.learner.optimizer.step, keep
    result = algorithm_class(settings.type)(settings).update(trainer.learner, ExampleBatch(examples, 1, 2))
    trainer.learner.optimizer.step = step
    return found, result


def assert_gradient(trainer, found, loss):
    trainer.model.zero_grad()
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_a_turn_that_begins_with_the_one_before_shares_its_prefix(trainer):
    for rewrites, shared in ((False, True), (True, False)):
        examples = conversations(rewrites)
        batch = trainer.learner.pack(examples, student_view)
        one = [ExampleTurn(t.student_prompt, None, t.completion) for t in examples[0].turns]
        apart = [replace(examples[0], turns=(turn,)) for turn in one]
        together = trainer.learner.pack(examples[:1], student_view).token_count
        separately = sum(trainer.learner.pack([e], student_view).token_count for e in apart)
        assert (separately - together >= len(one[0].student_prompt) + len(one[0].completion) - 1) is shared
        assert batch.rollout_count == 8
        assert batch.rollout.bincount().tolist() == [len(example.completion) for example in examples]


@pytest.mark.parametrize("rewrites", [False, True])
def test_implicit_rewards_sum_over_turns(trainer, rewrites):
    examples = conversations(rewrites)
    found = trainer.learner.sequence_log_probs(examples, teacher_view)
    for example, value in zip(examples, found, strict=True):
        torch.testing.assert_close(value, sum_over_turns(trainer, example, True).detach(), rtol=1e-4, atol=1e-4)
    rewards = torch.stack(
        [0.1 * (sum_over_turns(trainer, e, True) - sum_over_turns(trainer, e, False)) for e in examples]
    ).detach()
    is_success = torch.tensor([example.is_success for example in examples])
    margin = rewards[is_success].mean() - rewards[~is_success].mean()
    metrics = refine_teacher(trainer.learner, examples, trainer.args.algorithm, 2).metrics
    assert metrics["margin_before"] == pytest.approx(float(margin), rel=1e-3, abs=1e-5)


def test_grpo_gives_every_turn_its_rollouts_advantage(trainer):
    examples = conversations()
    found, _ = update(trainer, examples, GRPOSettings())
    advantages = group_advantages(examples, False)
    tokens = sum(len(example.completion) for example in examples)
    loss = -sum(float(advantages[example.rollout][0]) * sum_over_turns(trainer, example, False) for example in examples)
    assert_gradient(trainer, found, loss / tokens)


@pytest.mark.parametrize("untaught", [None, 0])
def test_the_m_step_distils_the_turns_that_have_a_teacher(trainer, untaught):
    examples = conversations(untaught=untaught)
    found, result = update(trainer, examples, SDPOSettings(teacher="live"))
    loss, tokens = torch.zeros(()), 0
    for example in with_teacher(examples):
        assert len(example.turns) == (2 if untaught is None else 1)
        for turn in example.turns:
            logits = [
                trainer.model(torch.tensor([p + turn.completion])).logits[0, len(p) - 1 : -1].log_softmax(-1)
                for p in (turn.student_prompt, turn.teacher_prompt)
            ]
            loss = loss + (logits[0].exp() * (logits[0] - logits[1].detach())).sum()
            tokens += len(turn.completion)
        assert len(result.tokens[example.rollout].divergence) == len(example.completion)
    assert_gradient(trainer, found, loss / tokens)


def test_the_joint_loss_is_the_sum_of_its_parts_with_a_turn_without_a_teacher(trainer):
    examples = conversations(untaught=1)
    joint, _ = update(trainer, examples, JointSettings(teacher="live", distillation_weight=0.5, reward_weight=2.0))
    distilled, _ = update(trainer, examples, SDPOSettings(teacher="live"))
    rewarded, _ = update(trainer, examples, GRPOSettings())
    for name, value in joint.items():
        expected = 0.5 * distilled[name] + 2.0 * rewarded[name]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()), msg=name)


def test_a_rollout_counts_once_in_a_mean_over_sequences():
    examples = conversations()
    tokens = sum(len(example.completion) for example in examples)
    weights = token_weights(examples, "sequence_mean", Counts(tokens, len(examples)))
    parts = weights.split([len(example.completion) for example in examples])
    assert all(torch.isclose(part.sum(), torch.tensor(1 / len(examples))) for part in parts)
