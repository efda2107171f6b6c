"""Every text of the teacher's prompt stands in it as it is, or the run is refused at its start."""

from __future__ import annotations

import pytest
from tiny import CHAT_TEMPLATE, tokenizer
from toy import toy_trainer

from vpd.config import ConfigError, FeedbackSettings
from vpd.environments.rows import Row, chat_prompt
from vpd.feedback import FeedbackTexts, PromptBuilder
from vpd.feedback.critique import request
from vpd.types import Rollout, Task, Turn

PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]
TEXTS = FeedbackTexts("sibling", False, solution="Four.", feedback="Too low.")
READS_PARTS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}",
)
FAILS_ON_PARTS = CHAT_TEMPLATE.replace("message['content']", "'' + message['content']")


def altered(filter: str) -> str:
    return CHAT_TEMPLATE.replace("message['content']", f"message['content'] | {filter}")


def builder(template: str = CHAT_TEMPLATE, **templates: str) -> PromptBuilder:
    settings = FeedbackSettings.model_validate({"templates": templates})
    return PromptBuilder(tokenizer(template), settings, 500)


@pytest.mark.parametrize(
    ("template", "text"),
    [(CHAT_TEMPLATE, "What is\n2 + 2?"), (FAILS_ON_PARTS, "What is\n2 + 2?"), (READS_PARTS, "What is2 + 2?")],
)
def test_contents_given_as_parts_are_their_text_for_student_and_teacher(template, text):
    prompts = builder(template, prompt="Again: {prompt}{solution}{feedback} Now.")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PARTS}]
    student = prompts.tokenizer.decode(prompts.student(prompt))
    teacher = prompts.teacher(prompt, TEXTS).text
    assert f"user\n{text}<|im_end|>" in student
    assert f"user\nAgain: {text}\n\nCorrect solution:\n\nFour." in teacher
    assert teacher.endswith("Too low. Now.<|im_end|>\n<|im_start|>assistant\n")
    assert prompt[1]["content"] == [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]


def test_rows_and_critics_take_parts_too():
    message = {"role": "user", "content": PARTS}
    assert chat_prompt(Row("a", "a", {"prompt": [message]})) == [message]
    with pytest.raises(ConfigError, match="must be a text or chat messages"):
        chat_prompt(Row("a", "a", {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}))
    rollout = Rollout(Task("a", [message]), 0, [Turn([], [], [], False, "5")])
    assert "Problem:\nWhat is\n2 + 2?\n" in request(rollout)[0]["content"]
    chat = builder().chat([message])
    assert chat is not None
    assert "user\nWhat is\n2 + 2?<|im_end|>" in str(tokenizer().decode(chat))


def test_parts_that_are_no_text_are_refused():
    prompt = [{"role": "user", "content": [*PARTS, {"type": "image", "url": "x.png"}]}]
    for render in (builder().student, lambda prompt: builder(READS_PARTS).teacher(prompt, TEXTS)):
        with pytest.raises(ConfigError, match="a part of the type 'image', but only texts"):
            render(prompt)


@pytest.mark.parametrize("filter", ["upper", "title", "truncate(40)", "urlencode", "replace('[', '(')", "reverse"])
def test_templates_that_alter_contents_are_refused_instead_of_losing_feedback(filter):
    prompt = [{"role": "user", "content": "What is 2 + 2, and why is it so? Think well."}]
    with pytest.raises(ConfigError, match="does not write a message's content as it stands"):
        builder(altered(filter)).teacher(prompt, TEXTS)
    with pytest.raises(ConfigError, match="does not write a message's content as it stands"):
        builder(altered("upper")).chat(prompt)


def test_a_run_with_such_a_template_ends_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setattr("toy.tokenizer", lambda: tokenizer(altered("upper")))
    with pytest.raises(ConfigError, match="does not write a message's content as it stands"):
        toy_trainer(tmp_path)


@pytest.mark.parametrize("filter", ["trim", "lower", "replace('\\n', ' ')"])
def test_texts_stand_in_the_prompt_as_they_are_whatever_the_template_does_around_them(filter):
    told = FeedbackTexts("sibling", False, solution=" A\nB ", feedback=" Too LOW.\n")
    text = builder(altered(filter)).teacher([{"role": "user", "content": "2?"}], told).text
    assert " A\nB " in text
    assert " Too LOW.\n" in text
