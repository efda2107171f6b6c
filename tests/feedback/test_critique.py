"""Critiques of failed attempts: who gets one, what the critic is asked, and where its words end up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from openai_server import Server
from test_texts import group
from tiny import tokenizer
from toy import toy_trainer

from vpd.config import ConfigError, CritiqueSettings, EndpointSettings, FeedbackSettings
from vpd.feedback import (
    Answers,
    EndpointCritic,
    FeedbackTexts,
    Group,
    PromptBuilder,
    Tally,
    build_views,
    choose_texts,
    make_sources,
)
from vpd.feedback.critique import request
from vpd.runs.folder import read_metrics
from vpd.seeds import mix
from vpd.types import Task


class Recorder:
    """A critic that says which attempt it read, unless it is told what to say."""

    def __init__(self, *texts):
        self.asked = []
        self.texts = texts

    def write(self, rollouts, seed):
        self.asked += [rollout.text for rollout in rollouts]
        return Answers(list(self.texts) or [f"critique of {rollout.text}" for rollout in rollouts], 5, 0.5)


def views(rollouts, critic, **settings):
    flags = [rollout.verdict is not None and rollout.verdict.reward == 1 for rollout in rollouts]
    prompts = PromptBuilder(tokenizer(), FeedbackSettings(**settings), 1000)
    return build_views(rollouts, flags, prompts, seed=0, sources=make_sources(prompts.settings, critic)).views


def test_failures_get_a_critique_and_successes_the_environments_text():
    settings = FeedbackSettings(sources=["critique", "environment"])
    attempts = Group(group(0, 1, 0), [False, True, False])
    (texts,) = choose_texts([attempts], make_sources(settings, Recorder("too short", None)))
    assert texts == [
        FeedbackTexts("critique", False, critique="too short"),
        FeedbackTexts("critique", True, feedback="text 1"),
        None,
    ]
    sources = make_sources(settings, Recorder(None, None))
    (texts,) = choose_texts([attempts], sources)
    assert [text and text.source for text in texts] == ["environment"] * 3
    assert sources[0].tally() == Tally({"critiques": 2, "critiques_missing": 2}, {"critique": 0.5}, 5)


def test_a_batch_is_told_what_its_own_critiques_took():
    settings = FeedbackSettings(sources=["critique"])
    sources = make_sources(settings, Recorder("too short", None))
    prompts = PromptBuilder(tokenizer(), settings, 1000)
    for rollouts, critiques, missing in ((group(0, 1, 0), 2, 1), (group(1, 1), 0, 0), (group(0, 0), 2, 1)):
        flags = [rollout.verdict.reward == 1 for rollout in rollouts]
        tally = build_views(rollouts, flags, prompts, seed=0, sources=sources).tally
        assert tally.counts == {"critiques": critiques, "critiques_missing": missing}
        asked = critiques > 0
        assert (tally.token_count, tally.seconds.get("critique", 0)) == (5 * asked, 0.5 * asked)


def test_only_failures_of_groups_that_no_earlier_source_serves_are_critiqued():
    rollouts = [*group(0, 1, 1), *group(0, 0, index=1), *group(None, 0, index=2)]
    critic = Recorder()
    found = views(rollouts, critic, sources=["sibling", "critique"])
    assert critic.asked == ["answer 0", "answer 1", "answer 1"]
    assert [view and view.source for view in found] == ["sibling"] * 3 + ["critique"] * 2 + [None, "critique"]
    alone = Recorder()
    views(rollouts, alone, sources=["critique"])
    assert alone.asked == ["answer 0", "answer 0", "answer 1", "answer 1"]


def test_a_critique_stands_in_the_siblings_slot_of_the_teachers_prompt():
    (first, _) = views(group(0, 0), Recorder(), sources=["critique"])
    text = tokenizer().decode(first.first.prompt_ids)
    assert "q\n\nThe following is a critique of your unsuccessful earlier attempt:\n\ncritique of answer 0\n" in text
    assert "Correct solution" not in text


def test_the_critic_is_told_the_problem_the_attempt_and_the_answer_and_asked_not_to_state_it():
    (rollout,) = group(0)
    asked = request(rollout)[0]["content"]
    assert "Problem:\nq\n" in asked
    assert "attempt:\nanswer 0\n" in asked
    assert "right answer" not in asked
    assert "Do not state the answer" in asked
    task = Task("t", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], reference="B")
    thinking = replace(rollout, task=task, turns=[replace(rollout.turns[0], text="<think>hm</think>C")])
    asked = request(thinking)[0]["content"]
    assert "for your eyes only:\nB\n" in asked
    assert "hm" not in asked
    assert "attempt:\nC\n" in asked


def test_special_tokens_in_an_attempt_cannot_open_a_turn():
    prompts = PromptBuilder(tokenizer(), FeedbackSettings(), 1000)
    special = tokenizer().eos_token
    plain, attacked = (prompts.chat([{"role": "user", "content": text}]) for text in ("x", f"x{special}"))
    assert plain is not None
    assert attacked is not None
    assert attacked.count(tokenizer().eos_token_id) == plain.count(tokenizer().eos_token_id)
    short = PromptBuilder(tokenizer(), FeedbackSettings(max_prompt_length=5), 1000)
    assert short.chat([{"role": "user", "content": "x" * 100}]) is None


def test_the_network_criticises_itself_within_its_budget(tmp_path):
    feedback = {"sources": ["critique"], "critique": {"max_tokens": 7}}
    trainer = toy_trainer(tmp_path / "run", feedback=feedback, algorithm={"type": "vpd", "e_step_every": 1})
    asked = []
    engine, generate = trainer.sampler.engine, trainer.sampler.engine.generate

    def watched(prompts, parameters, *, seed, **how):
        samples = generate(prompts, parameters, seed=seed, **how)
        if parameters.max_new_tokens == 7:
            asked.append((len(prompts), seed, sum(len(sample.token_ids) for (sample,) in samples)))
        return samples

    engine.generate = watched
    output = trainer.train()
    lines = [line for line in read_metrics(tmp_path / "run") if line["event"] == "train"]
    assert output.global_step == 2
    # One batch of critiques a step, and one for each measured gap; each of all failures.
    assert len(asked) == 4
    assert all(line["seconds_critique"] > 0 for line in lines)
    # Seeds are those of the batch, and of either gap the same.
    run_seed = trainer.args.run.seed
    assert [seed for _, seed, _ in asked] == [mix(mix(run_seed, step, 0), 1) for step in (0, 1, 2, 0)]
    for line, (count, _, tokens) in zip(lines, asked[1:3], strict=True):
        assert line["critiques"] == count
        assert line["tokens_rollout"] == 8 * line["length_mean"] + tokens
    assert "margin_before_critique" in lines[0]
    again = toy_trainer(tmp_path / "again", feedback=feedback, algorithm={"type": "vpd", "e_step_every": 1})
    again.train()
    second = [line for line in read_metrics(tmp_path / "again") if line["event"] == "train"]
    assert [line["m_loss"] for line in lines] == [line["m_loss"] for line in second]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("CRITIC_KEY", "secret")
    server = Server("Look at the sign again.")
    yield server
    server.close()


def settings_of(server, **changes):
    endpoint = EndpointSettings(model="m", base_url=server.url, api_key_env="CRITIC_KEY", max_retries=1, **changes)
    return CritiqueSettings(endpoint=endpoint, max_tokens=33)


def test_an_endpoint_criticises_and_what_fails_has_no_critique(server, caplog):
    server.answers = [500, 500, 401]
    critic = EndpointCritic(settings_of(server, concurrency=1))
    written = critic.write(group(0, 0, 0), seed=0)
    assert written == Answers([None, None, "Look at the sign again."])
    assert [request["max_tokens"] for request in server.requests] == [33] * 4
    assert "The critic failed: InternalServerError" in caplog.text
    found = views(group(0, 0, 0), critic, sources=["critique"])
    assert all(view is not None for view in found)


def test_a_run_with_an_endpoint_as_the_critic(server, tmp_path):
    feedback = {"sources": ["critique"], "critique": settings_of(server).model_dump()}
    toy_trainer(tmp_path / "run", feedback=feedback).train()
    assert server.requests
    config = (tmp_path / "run" / "config.json").read_text()
    assert "secret" not in config


def test_an_endpoint_without_a_key_is_refused_at_the_start(server, tmp_path, monkeypatch):
    monkeypatch.delenv("CRITIC_KEY")
    with pytest.raises(ConfigError, match="variable CRITIC_KEY holds no key"):
        toy_trainer(tmp_path / "run", feedback={"sources": ["critique"], "critique": settings_of(server).model_dump()})
