"""Which rollout is told what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tokenizer

from vpd.algorithms.example import make_examples, student_view, teacher_view
from vpd.config import FeedbackSettings
from vpd.feedback import Group, PromptBuilder, build_views, choose_texts, make_sources
from vpd.feedback.texts import FeedbackTexts, permute_across_groups, without_thinking
from vpd.types import Rollout, Task, Turn, Verdict

TASK = Task("t", [{"role": "user", "content": "q"}])


def group(*outcomes, texts=True, index=0):
    return [
        Rollout(TASK, index, [Turn([1, 2], [10 + i, 11], [0.0, 0.0], False, f"answer {i}")],
                None if outcome is None else Verdict(float(outcome), f"text {i}" if texts else None))
        for i, outcome in enumerate(outcomes)
    ]  # fmt: skip


def choose(rollouts, **settings):
    flags = [rollout.verdict.reward == 1 for rollout in rollouts]
    return choose_texts([Group(rollouts, flags)], make_sources(FeedbackSettings(**settings)))[0]


def test_a_sibling_is_a_success_of_the_group_and_never_oneself():
    texts = choose(group(0, 1, 0, 1), sources=["sibling"])
    assert [text.solution for text in texts] == ["answer 1", "answer 3", "answer 1", "answer 1"]
    assert all(text.feedback is None for text in texts)


def test_the_shortest_success_may_be_the_sibling():
    rollouts = group(0, 1, 1, 1)
    rollouts[1].turns[0].completion_ids.extend([7, 7])
    texts = choose(rollouts, sources=["sibling"], sibling="shortest")
    assert [text.solution for text in texts] == ["answer 2", "answer 2", "answer 3", "answer 2"]
    first = choose(rollouts, sources=["sibling"])
    assert [text.solution for text in first] == ["answer 1", "answer 2", "answer 1", "answer 1"]


def test_a_lone_success_has_no_sibling_and_no_other_source_takes_its_place():
    texts = choose(group(0, 1, 0), sources=["sibling", "environment"])
    assert texts[1] is None
    assert texts[0].solution == texts[2].solution == "answer 1"


def test_an_all_failed_group_is_left_out_with_siblings_and_told_by_the_environment():
    assert choose(group(0, 0), sources=["sibling"]) == [None, None]
    texts = choose(group(0, 0), sources=["sibling", "environment"])
    assert [(text.source, text.feedback) for text in texts] == [("environment", "text 0"), ("environment", "text 1")]


def test_preference_decides_where_both_sources_have_something():
    texts = choose(group(0, 1, 1), sources=["environment", "sibling"])
    assert {text.source for text in texts} == {"environment"}
    assert all(text.solution is None for text in texts)


@pytest.mark.parametrize("only", [True, False])
def test_solution_and_feedback_together_unless_asked_otherwise(only):
    texts = choose(group(0, 1), sources=["sibling", "environment"], feedback_only_without_solution=only)
    assert texts[0].feedback == (None if only else "text 0")


def test_no_text_means_no_feedback():
    assert choose(group(0, 1, texts=False), sources=["environment"]) == [None, None]


def test_thinking_is_removed_from_a_sibling():
    assert without_thinking("<think>hm\nhm</think>\nFour.") == "Four."
    assert without_thinking("Four. <think>never closed") == "Four."
    assert without_thinking("opened by the prompt</think>\nFour.") == "Four."


def test_ungraded_rollouts_have_no_view_and_are_nobodys_sibling():
    prompts = PromptBuilder(tokenizer(), FeedbackSettings(sources=["sibling"]), 100)
    rollouts = group(None, 1, 0)
    views = build_views(rollouts, [False, True, False], prompts, seed=0).views
    assert views[0] is None
    assert "answer 1" in views[2].first.text


def test_student_and_teacher_score_identical_completion_ids():
    prompts = PromptBuilder(tokenizer(), FeedbackSettings(), 100)
    rollouts = group(0, 1, 1, 0)
    flags = [rollout.verdict.reward == 1 for rollout in rollouts]
    examples = make_examples(rollouts, flags, build_views(rollouts, flags, prompts, seed=0).views)
    assert len(examples) == 4
    for example in examples:
        ((student, student_start),), ((teacher, teacher_start),) = student_view(example), teacher_view(example)
        assert student[student_start:] == teacher[teacher_start:] == rollouts[example.rollout].completion_ids
        assert student[:student_start] != teacher[:teacher_start]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=2, max_size=5))
def test_permuted_texts_come_from_another_group_and_are_as_many(pattern):
    texts, groups = [], []
    for index, members in enumerate(pattern):
        for has_text in members:
            texts.append(FeedbackTexts("sibling", False, solution=str(index)) if has_text else None)
            groups.append(index)
    permuted = permute_across_groups(texts, groups)
    if sum(any(members) for members in pattern) < 2:
        assert permuted == [None] * len(texts)
        return
    for text, own, index in zip(permuted, texts, groups, strict=True):
        assert (text is None) == (own is None)
        assert text is None or text.solution != str(index)
