"""The updates of GRPO and its mixtures with a teacher are made of the right terms."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from toy import toy_trainer

from vpd.algorithms import (
    ExampleBatch,
    GRPOSettings,
    JointSettings,
    OPSASettings,
    ReshapeSettings,
    ReweightSettings,
    SDPOSettings,
    VPDSettings,
)
from vpd.algorithms.example import make_examples, student_view, with_teacher
from vpd.algorithms.m_step import old_log_probs
from vpd.algorithms.opsa import lowest_token_advantages
from vpd.algorithms.policy_step import group_advantages
from vpd.algorithms.reweight import mixing
from vpd.config import ConfigError, VPDConfig, algorithm_class

NO_CLIP = {"epsilon": 1e6, "epsilon_high": 1e6}


@pytest.fixture
def trainer(tmp_path):
    # Gradients are compared, and a clipped norm would hide their sizes.
    return toy_trainer(tmp_path / "run", optim={"max_grad_norm": 1e9})


@pytest.fixture
def examples(trainer):
    """Two groups of four with both outcomes; the second half of each has no teacher."""
    batch = trainer.with_feedback(trainer.sampler.sample(trainer.curriculum.tasks_of_step(1), 4, seed=1))
    found = make_examples(batch.rollouts, batch.is_success, batch.views)
    assert {example.is_success for example in found} == {True, False}
    return found


def without_teacher(examples, chosen):
    return [
        replace(e, turns=tuple(replace(turn, teacher_prompt=None) for turn in e.turns), source=None) if chosen(e) else e
        for e in examples
    ]


def update(trainer, examples, settings, step=1):
    """The gradient that the update hands to the optimizer, by parameter; the weights stay as they are."""
    found = {}

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    actual, trainer.learner.optimizer.step = trainer.learner.optimizer.step, keep
    algorithm = algorithm_class(settings.type)(settings)
    result = algorithm.update(trainer.learner, ExampleBatch(examples, step, 2))
    trainer.learner.optimizer.step = actual
    return found, result


def assert_close(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    largest = max(float(value.abs().max()) for value in second.values())
    assert largest > 0
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=tolerance * largest, msg=name)


def test_advantages_are_centred_within_each_group_and_scaled_as_trl_does(examples):
    plain, scaled = (group_advantages(examples, scale) for scale in (False, True))
    for group in (0, 1):
        members = [example for example in examples if example.group == group]
        rewards = torch.tensor([example.reward for example in members])
        for example, reward in zip(members, rewards, strict=True):
            assert len(plain[example.rollout]) == len(example.completion)
            expected = reward - rewards.mean()
            torch.testing.assert_close(plain[example.rollout][0], expected)
            torch.testing.assert_close(scaled[example.rollout][0], expected / (rewards.std() + 1e-4))


def test_grpo_is_the_policy_gradient_of_all_graded_rollouts(trainer, examples):
    unread = without_teacher(examples, lambda example: True)
    found, result = update(trainer, unread, GRPOSettings())
    module, learner = trainer.learner.module, trainer.learner
    trainer.model.zero_grad()
    advantages = group_advantages(examples, False)
    count = sum(len(example.completion) for example in examples)
    total = torch.zeros(())
    for example in examples:
        ((sequence, start),) = student_view(example)
        logits = trainer.model(torch.tensor([sequence])).logits[0, start - 1 : -1] / learner.temperature
        written = torch.tensor(example.completion)
        log_probs = logits.log_softmax(-1).gather(1, written[:, None])[:, 0]
        total = total - (advantages[example.rollout] * log_probs).sum() / count
    total.backward()
    assert module is not None
    assert_close(found, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert result.metrics["ratio_clipped_share"] == 0.0
    assert result.tokens == {}


def test_the_joint_gradient_is_the_weighted_sum_of_its_parts(trainer, examples):
    some = without_teacher(examples, lambda example: example.rollout % 2 == 0)
    joint, result = update(trainer, some, JointSettings(distillation_weight=0.3, reward_weight=2.0))
    distilled, _ = update(trainer, some, SDPOSettings(teacher="live"))
    rewarded, _ = update(trainer, some, GRPOSettings())
    assert_close(joint, {name: 0.3 * distilled[name] + 2.0 * rewarded[name] for name in joint})
    # The numbers token by token are those of the rollouts with a teacher.
    assert set(result.tokens) == {example.rollout for example in some if example.has_teacher}
    for example in some:
        if example.has_teacher:
            assert len(result.tokens[example.rollout].divergence) == len(example.completion)


def test_reshaping_adds_the_teachers_log_ratio_to_each_tokens_advantage(trainer, examples):
    some = without_teacher(examples, lambda example: example.rollout % 2 == 0)
    rewarded, _ = update(trainer, some, GRPOSettings(**NO_CLIP))
    assert_close(update(trainer, some, ReshapeSettings(distillation_weight=0.0, **NO_CLIP))[0], rewarded)
    # The log-ratio alone is the sampled estimate without its baseline, over all tokens instead of those with a teacher.
    log_ratio, _ = update(trainer, some, ReshapeSettings(reward_weight=0.0, **NO_CLIP))
    sampled, _ = update(trainer, some, SDPOSettings(teacher="live", divergence="sampled", control_variate=False))
    taught = sum(len(example.completion) for example in some if example.has_teacher)
    share = taught / sum(len(example.completion) for example in some)
    assert_close(log_ratio, {name: share * value for name, value in sampled.items()})


def test_reweighting_fades_into_grpo(trainer, examples):
    settings = ReweightSettings(weight_epsilon=0.3, mixing=0.8, mixing_steps=10, **NO_CLIP)
    assert [round(mixing(settings, step), 2) for step in (1, 6, 11, 50)] == [0.8, 0.4, 0.0, 0.0]
    rewarded, _ = update(trainer, examples, GRPOSettings(**NO_CLIP))
    assert_close(update(trainer, examples, settings, step=11)[0], rewarded)
    weighted, _ = update(trainer, examples, settings, step=1)
    assert any((weighted[name] - rewarded[name]).abs().max() > 1e-6 for name in weighted)
    # Without a teacher every token's weight is 1.
    alone = without_teacher(examples, lambda example: True)
    assert_close(update(trainer, alone, settings, step=1)[0], rewarded)


def test_opsa_lowers_the_least_likely_tokens_and_asks_nobody(trainer, examples):
    advantages = lowest_token_advantages(trainer.learner, examples, 0.2)
    values = torch.cat([advantages[example.rollout] for example in examples])
    log_probs = torch.cat(trainer.learner.token_log_probs(examples, student_view))
    chosen = values != 0
    assert 0.2 <= chosen.float().mean() < 0.2 + 2 / len(values)
    assert log_probs[chosen].max() <= log_probs[~chosen].min()
    # Minus a half for a sure student, minus one for one that knows nothing.
    assert ((values[chosen] >= -1.0) & (values[chosen] < -0.5)).all()
    unread = without_teacher(examples, lambda example: True)
    assert update(trainer, [replace(e, reward=0.0) for e in unread], OPSASettings())[0].keys()


@pytest.mark.parametrize("control_variate", [False, True])
def test_the_sampled_estimate_trains(trainer, examples, control_variate):
    settings = SDPOSettings(teacher="live", divergence="sampled", control_variate=control_variate)
    gradient, result = update(trainer, examples, settings)
    assert result.metrics["divergence"] > 0
    assert any(value.abs().max() > 0 for value in gradient.values())


@pytest.mark.parametrize("divergence", ["js", "sampled"])
def test_tokens_count_as_often_as_the_student_would_now_write_them(trainer, examples, divergence, monkeypatch):
    def gradient(clip, m_minibatch_prompts=None):
        settings = SDPOSettings(
            teacher="live", divergence=divergence, importance_clip=clip, m_minibatch_prompts=m_minibatch_prompts
        )
        return update(trainer, with_teacher(examples), settings)[0]

    plain = gradient(0, m_minibatch_prompts=1)
    # As if the student had written every token three times less often than it now would.
    real = trainer.learner.token_log_probs
    monkeypatch.setattr(trainer.learner, "token_log_probs", lambda *args: [v - math.log(3.0) for v in real(*args)])
    assert_close(gradient(2.0, m_minibatch_prompts=1), {name: 2 * value for name, value in plain.items()})
    assert_close(gradient(9.0, m_minibatch_prompts=1), {name: 3 * value for name, value in plain.items()})
    unbounded = 3 if divergence == "sampled" else 1
    assert_close(gradient(None, m_minibatch_prompts=1), {name: unbounded * value for name, value in plain.items()})


def test_the_student_is_asked_what_it_wrote_only_where_an_update_comes_between(trainer, examples):
    def asked(settings, **kwargs):
        return old_log_probs(trainer.learner, examples, settings, 2, **kwargs) is not None

    assert not asked(SDPOSettings())
    assert asked(SDPOSettings(m_minibatch_prompts=1))
    assert not asked(SDPOSettings(m_minibatch_prompts=2))
    assert asked(SDPOSettings(), e_step=True)
    assert not asked(SDPOSettings(importance_clip=0, m_minibatch_prompts=1))
    assert not asked(VPDSettings(), e_step=True)
    assert asked(VPDSettings(divergence="sampled"), e_step=True)
    assert SDPOSettings(divergence="sampled").importance_clip is None
    assert (SDPOSettings().importance_clip, JointSettings().importance_clip) == (2.0, 2.0)
    assert not asked(VPDSettings(divergence="sampled", importance_clip=0), e_step=True)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "grpo"},
        {"type": "grpo", "scale_rewards": True, "m_minibatch_prompts": 1},
        {"type": "joint", "divergence": "js", "top_k": 5},
        {"type": "joint", "divergence": "sampled"},
        {"type": "reshape"},
        {"type": "reweight"},
        {"type": "opsa"},
        {"type": "sdpo", "top_k": 3, "support": "intersection"},
        {"type": "sdpo", "top_k": 3, "correction": "stopgrad"},
        {"type": "vpd", "divergence": "sampled", "m_minibatch_prompts": 1, "importance_clip": 2.0},
    ],
)
def test_each_algorithm_runs_from_a_config(tmp_path, algorithm):
    trainer = toy_trainer(tmp_path / "run", algorithm=algorithm, run={"max_steps": 1})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["algorithm"] == algorithm["type"]
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"type": "sdpo", "divergence": "sampled", "top_k": 5}, "top_k does nothing"),
        ({"type": "vpd", "divergence": "js", "top_k": 5, "correction": "stopgrad"}, "is for reverse_kl, not js"),
        ({"type": "vpd", "importance_clip": 0.5}, "no token would ever count in full"),
        ({"type": "grpo", "divergence": "js"}, "divergence"),
        ({"type": "joint", "teacher": "frozen"}, "is not offered with joint"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(algorithm, message):
    with pytest.raises(ConfigError, match=message):
        VPDConfig.parse({"algorithm": algorithm})


@pytest.mark.parametrize("rollout", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_the_sampled_estimate_refuses_truncated_sampling(rollout):
    with pytest.raises(ConfigError, match="untruncated sampling"):
        VPDConfig.parse({"algorithm": {"type": "vpd", "divergence": "sampled"}, "rollout": rollout})
    VPDConfig.parse({"algorithm": {"type": "grpo"}, "rollout": rollout})
