"""The sampler returns what it made, with what that took, and keeps nothing."""

from __future__ import annotations

import pytest
from engines import ScriptedEngine
from tiny import tokenizer
from toy import ToyEnvironment, toy_trainer

from vpd.config import CritiqueSettings, EvalSettings, FeedbackSettings, RolloutSettings
from vpd.evaluation import evaluate
from vpd.feedback import PromptBuilder
from vpd.feedback.texts import without_thinking
from vpd.rollout import RolloutSampler, Sample
from vpd.runs.folder import read_metrics


class Moody(ToyEnvironment):
    """Its judge fails on completions that begin with an a."""

    def judge(self, task, completion):
        if completion.startswith("a"):
            raise OSError("no a, please")
        return super().judge(task, completion)


@pytest.fixture
def sampler():
    settings = RolloutSettings(max_prompt_length=100, temperature=0.5, top_k=9, min_p=0.1, top_p=0.8)
    prompts = PromptBuilder(tokenizer(), FeedbackSettings(max_prompt_length=60), 100)
    return RolloutSampler(ScriptedEngine(tokenizer()), tokenizer(), Moody(), prompts, settings, (7,))


def tasks(count):
    return ToyEnvironment().tasks("train")[:count]


def test_rollouts_come_with_what_they_took(sampler):
    sampled = sampler.sample(tasks(4), 8, seed=3, first_group=1, group_stride=2)
    lengths = [len(rollout.completion_ids) for rollout in sampled.rollouts]
    assert (sampled.seed, sampled.token_count, len(lengths)) == (3, sum(lengths), 32)
    assert [rollout.group for rollout in sampled.rollouts] == [group for group in (1, 3, 5, 7) for _ in range(8)]
    assert sampled.seconds.keys() == {"rollout", "judge"}
    ungraded = [rollout for rollout in sampled.rollouts if rollout.verdict is None]
    assert 0 < len(ungraded) < 32
    assert all(rollout.text.startswith("a") for rollout in ungraded)
    (error,) = set(sampled.judge_errors)
    assert len(sampled.judge_errors) == len(ungraded)
    assert error.startswith(f"OSError: no a, please ({__file__}, line ")


def test_one_call_does_not_count_for_the_next(sampler):
    first, _, again = (
        sampler.sample(tasks(2), 4, seed=3),
        sampler.sample(tasks(9), 4, 5),
        sampler.sample(tasks(2), 4, 3),
    )
    assert (again.rollouts, again.token_count) == (first.rollouts, first.token_count)
    assert again.judge_errors == first.judge_errors


def test_what_the_engine_is_asked(sampler):
    evaluate(sampler, tasks(2), EvalSettings(k=4, temperature=0.3, top_p=0.9, min_p=0.2), 1.0, seed=3)
    taught = sampler.sample_teacher([[5, 6], [7], [8]], tasks(3), seed=4)
    chats = [[{"role": "user", "content": text}] for text in ("x" * 100, "Hello.")]
    answers = sampler.answer(chats, CritiqueSettings(max_tokens=5, temperature=0.3), seed=6)
    (asked, own, critique), seeds, teachers, counts = (
        [call[index] for call in sampler.engine.calls] for index in (1, 2, 3, 0)
    )
    assert (seeds, teachers, counts) == ([3, 4, 6], [False, True, False], [2, 3, 1])
    # An evaluation cuts by its own settings alone; the run's top-k of 9 is none of its business.
    assert (asked.temperature, asked.top_p, asked.top_k, asked.min_p) == (0.3, 0.9, 0, 0.2)
    assert asked.num_generations == 4
    assert (own.temperature, own.top_p, own.min_p, own.num_generations) == (0.5, 0.8, 0.1, 1)
    assert (critique.temperature, critique.top_p, critique.top_k, critique.max_new_tokens) == (0.3, 1.0, 0, 5)
    assert asked.eos_token_ids == own.eos_token_ids == critique.eos_token_ids == {7}
    assert [rollout.turns[0].prompt_ids for rollout in taught.rollouts] == [[5, 6], [7], [8]]
    # The first chat is longer than the teacher's limit.
    assert answers.texts[0] is None
    assert answers.token_count == len(answers.texts[1]) > 0
    assert answers.seconds > 0


@pytest.mark.parametrize(
    ("text", "fails", "reward", "said"),
    [
        ("cb", False, 1.0, "It ends with b, which is even."),
        ("cc", False, 0.0, "It ends with c, which is odd."),
        ("cb", True, 0.0, None),
        ("ab", True, 0.0, None),
    ],
)
def test_what_the_length_limit_cut_off_is_judged_unless_it_counts_as_a_failure(
    sampler, monkeypatch, text, fails, reward, said
):
    cut = Sample(tokenizer()(text, add_special_tokens=False)["input_ids"], [0.0, 0.0])
    monkeypatch.setattr(sampler.engine, "generate", lambda *args, **kwargs: [[cut]])
    sampler.truncated_fails = fails
    sampled = sampler.sample(tasks(1), 1, seed=0)
    (rollout,) = sampled.rollouts
    assert (rollout.truncated, rollout.verdict.reward, sampled.judge_errors) == (True, reward, [])
    told = "Your answer was cut off at the length limit before it was finished. Answer more briefly."
    assert rollout.verdict.feedback == (f"{said}\n{told}" if said else told)
    assert rollout.verdict.details == {"truncated": True}


def test_a_judge_that_fails_on_what_was_cut_off_leaves_it_ungraded(sampler, monkeypatch):
    cut = Sample(tokenizer()("ab", add_special_tokens=False)["input_ids"], [0.0, 0.0])
    monkeypatch.setattr(sampler.engine, "generate", lambda *args, **kwargs: [[cut]])
    sampled = sampler.sample(tasks(1), 1, seed=0)
    assert sampled.rollouts[0].verdict is None
    assert len(sampled.judge_errors) == 1


@pytest.mark.parametrize("measured", [False, True])
def test_a_step_counts_its_own_tokens_and_those_of_the_algorithms_fresh_rollouts(tmp_path, measured):
    """Measurements before, between and within steps do not count; what the E-step is measured on does."""
    measurements = {"preflight_tasks": 3, "eval_steps": 1} if measured else {"preflight_tasks": 0, "final_tasks": 0}
    optim = {"learning_rate": 1e-3, "extrapolation": measured, "extrapolation_tasks": 3}
    for margin_tasks in (0, 2):
        folder = tmp_path / str(margin_tasks)
        toy_trainer(folder, eval={**measurements, "margin_tasks": margin_tasks}, optim=optim).train()
        first, second = [line for line in read_metrics(folder) if line["event"] == "train"]
        # The first step of the toy has an E-step, the second has none.
        fresh = first["tokens_rollout"] - 8 * first["length_mean"]
        assert fresh > 0 if margin_tasks else fresh == 0
        assert second["tokens_rollout"] == 8 * second["length_mean"]
        assert all(line["seconds_rollout"] > 0 and line["seconds_judge"] > 0 for line in (first, second))
        assert "seconds_critique" not in first


def test_the_judge_sees_special_tokens_but_those_that_end_a_turn_and_padding(sampler, monkeypatch):
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    own = tokenizer(pad_token="<|pad|>")
    own.add_tokens(marks, special_tokens=True)
    text = "<think>hm</think><tool_call>{}</tool_call>"
    sample = Sample([*own(text)["input_ids"], own.convert_tokens_to_ids("<|im_end|>"), own.pad_token_id], [])
    assert len(set(sample.token_ids)) > len(marks)
    sampler.tokenizer = own
    sampler.eos_token_ids = (own.convert_tokens_to_ids("<|im_end|>"),)
    monkeypatch.setattr(sampler.engine, "generate", lambda *args, **kwargs: [[sample]])
    (rollout,) = sampler.sample(tasks(1), 1, seed=0).rollouts
    assert rollout.text == text
    chat = [{"role": "user", "content": "Hello."}]
    assert sampler.answer([chat], CritiqueSettings(), seed=0).texts == [text]
    assert without_thinking(rollout.text) == "<tool_call>{}</tool_call>"
