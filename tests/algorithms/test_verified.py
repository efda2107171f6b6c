"""The default: GRPO on groups that the teacher's confirmed answers complete."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tokenizer
from toy import ToyEnvironment, toy_config, toy_model, toy_trainer

from vpd import Verdict, VPDTrainer
from vpd.algorithms import ExampleBatch, Verified, VerifiedSettings
from vpd.algorithms.example import Example, ExampleTurn
from vpd.runs.folder import read_metrics, rollout_files
from vpd.runs.samples import read_rollouts
from vpd.types import Task


def example(rollout, group, reward, source="environment", completion=(5,)):
    turn = ExampleTurn([1, 2], None if source is None else [1, 3, 2], list(completion))
    return Example(rollout, group, (turn,), reward, reward >= 1.0, source)


def algorithm(**settings):
    return Verified(VerifiedSettings(**settings))


MIXED = [example(0, 0, 0.0), example(1, 0, 1.0)]
FAILED = [example(2, 1, 0.0), example(3, 1, 0.0)]
UNTOLD = [example(4, 2, 0.0, source=None), example(5, 2, 0.0, source=None)]


def test_the_teacher_is_asked_where_a_group_failed_as_a_whole_and_has_feedback():
    assert algorithm().second_attempts(None, [*MIXED, *FAILED, *UNTOLD]) == [2]
    # Half of the attempts are expected to be right before any has been seen.
    assert algorithm(attempts_per_group=2).second_attempts(None, [*MIXED, *FAILED, *UNTOLD]) == [2]
    assert algorithm(attempts_per_group=0).second_attempts(None, FAILED) == []


def failed_groups(count, source="environment"):
    return [example(2 * g + i, g, 0.0, source) for g in range(count) for i in (0, 1)]


def test_how_many_are_asked_follows_from_how_many_were_right_by_source():
    chooser = algorithm()
    examples = failed_groups(8) + [
        replace(e, group=8 + e.group, rollout=16 + e.rollout) for e in failed_groups(8, "critique")
    ]
    chooser.memory = {"environment.attempts": 18.0, "environment.successes": 0.0}
    chosen = chooser.second_attempts(None, examples)
    # 1 / 20 of 8, rounded up, of the source that fails; half of the other's.
    assert sum(rollout < 16 for rollout in chosen) == 1
    assert sum(rollout >= 16 for rollout in chosen) == 4
    chooser.memory = {"environment.attempts": 18.0, "environment.successes": 18.0}
    assert sum(rollout < 16 for rollout in chooser.second_attempts(None, examples)) == 8


def test_every_group_is_asked_once_before_any_is_asked_twice():
    chooser = algorithm(attempts_per_group=2)
    chooser.memory = {"environment.attempts": 18.0, "environment.successes": 9.0}
    assert chooser.second_attempts(None, failed_groups(4)) == [0, 2, 4, 6]


class Recorded:
    """Stands in for the policy gradient's step, and keeps what it is given."""

    def __call__(self, learner, batch, settings, advantages, **rest):
        from vpd.algorithms.base import UpdateResult

        self.examples, self.advantages = batch.examples, advantages
        return UpdateResult({"m_loss": 0.0})


class Alone:
    """One process."""

    def total(self, *values):
        return [float(value) for value in values]

    def union(self, names):
        return sorted(set(names))


def updated(monkeypatch, attempts, chooser=None):
    step = Recorded()
    monkeypatch.setattr("vpd.algorithms.verified.policy_step", step)
    chooser = chooser or algorithm()
    result = chooser.update(Alone(), ExampleBatch([*FAILED, *UNTOLD], 1, 3, second_attempts=attempts))  # pyright: ignore
    return step, result, chooser


def test_a_confirmed_answer_joins_its_group_and_its_reward_counts_in_the_mean(monkeypatch):
    step, result, _ = updated(monkeypatch, [example(6, 1, 1.0, completion=(7, 8))])
    assert [e.rollout for e in step.examples] == [2, 3, 6, 4, 5]
    assert step.advantages[6].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert step.advantages[2].tolist() == pytest.approx([-1 / 3])
    assert step.advantages[4].tolist() == [0.0]
    assert (result.metrics["second_attempts"], result.metrics["second_attempt_success_rate"]) == (1.0, 1.0)


def test_an_answer_that_is_not_confirmed_is_never_learned(monkeypatch):
    step, result, chooser = updated(monkeypatch, [example(6, 1, 0.5), example(7, 1, 0.0)])
    assert [e.rollout for e in step.examples] == [2, 3, 4, 5]
    assert all(not values.any() for values in step.advantages.values())
    assert result.metrics["second_attempt_success_rate"] == 0.0
    assert chooser.memory == {"environment.attempts": 2.0, "environment.successes": 0.0}


def test_the_same_answer_given_twice_is_learned_once(monkeypatch):
    step, result, _ = updated(monkeypatch, [example(6, 1, 1.0), example(7, 1, 1.0)])
    assert [e.rollout for e in step.examples if e.group == 1] == [2, 3, 7]
    assert result.metrics["second_attempts"] == 2.0


def test_what_was_seen_fades_from_batch_to_batch(monkeypatch):
    _, _, chooser = updated(monkeypatch, [example(6, 1, 1.0)])
    _, _, chooser = updated(monkeypatch, [], chooser)
    assert chooser.memory == pytest.approx({"environment.attempts": 0.8, "environment.successes": 0.8})
    _, result, _ = updated(monkeypatch, [], chooser)
    assert result.metrics["second_attempt_success_rate"] is None


class TellsTheAnswer(ToyEnvironment):
    """The student always fails, and the teacher, which is known by the length of what it reads, always succeeds."""

    def judge(self, task: Task, completion: str) -> Verdict:
        return Verdict(0.0, "Say b.")


def test_a_run_lets_the_teacher_try_keeps_what_it_wrote_and_learns_from_it(tmp_path, monkeypatch):
    config = toy_config(tmp_path, algorithm={"type": "verified"}, run={"max_steps": 1})
    trainer = VPDTrainer(toy_model(), config, TellsTheAnswer(), processing_class=tokenizer())
    sample_teacher, read = trainer.sampler.sample_teacher, []

    def confirmed(prompts, tasks, seed):
        read.extend(prompts)
        found = sample_teacher(prompts, tasks, seed)
        return replace(found, rollouts=[replace(r, verdict=Verdict(1.0, "Right.")) for r in found.rollouts])

    monkeypatch.setattr(trainer.sampler, "sample_teacher", confirmed)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    (line,) = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    # Half of the two groups that failed.
    assert (line["second_attempts"], line["second_attempt_success_rate"], line["success_rate"]) == (1, 1.0, 0.0)
    assert line["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    first, *others = read_rollouts(rollout_files(tmp_path)[1])
    assert (first.author, first.reward, first.source) == ("teacher", 1.0, "environment")
    assert "Say b." in (first.turns[0].teacher_prompt or "")
    # It is trained on as the student's own answer, behind the student's prompt.
    assert first.turns[0].prompt_ids == next(r for r in others if r.group == first.group).turns[0].prompt_ids
    assert len(read[0]) > len(first.turns[0].prompt_ids)
    assert {record.author for record in others} == {"student"}


def test_attempts_that_nobody_could_grade_count_as_tried_and_are_not_learned(tmp_path, monkeypatch):
    config = toy_config(tmp_path, algorithm={"type": "verified"}, run={"max_steps": 1})
    trainer = VPDTrainer(toy_model(), config, TellsTheAnswer(), processing_class=tokenizer())
    sample_teacher = trainer.sampler.sample_teacher

    def ungraded(prompts, tasks, seed):
        found = sample_teacher(prompts, tasks, seed)
        return replace(found, rollouts=[replace(r, verdict=None) for r in found.rollouts])

    monkeypatch.setattr(trainer.sampler, "sample_teacher", ungraded)
    trainer.train()
    (line,) = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    assert (line["second_attempts"], line["second_attempt_success_rate"], line["grad_norm"]) == (1, 0.0, 0.0)


def test_without_feedback_it_is_grpo(tmp_path):
    losses = []
    for name in ("verified", "grpo"):
        trainer = toy_trainer(tmp_path / name, algorithm={"type": name}, feedback={"sources": ["sibling"]})
        trainer.train()
        losses.append([line["m_loss"] for line in read_metrics(tmp_path / name) if line["event"] == "train"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_memory_goes_on_after_a_resume(tmp_path):
    settings = {"algorithm": {"type": "verified"}, "run": {"max_steps": 1, "save_steps": 1}}
    first = toy_trainer(tmp_path, **settings)
    first.train()
    first.algorithm.memory["environment.attempts"] = 4.0
    first.checkpoints.save()
    second = toy_trainer(tmp_path, **settings | {"run": {"max_steps": 1, "save_steps": 1}})
    second.train(resume_from_checkpoint=True)
    assert second.algorithm.memory["environment.attempts"] == 4.0
