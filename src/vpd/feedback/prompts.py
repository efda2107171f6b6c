"""Turns chats into token ids.

Feedback is data: it can neither open a turn of the chat nor push the question out.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from vpd.config import ConfigError, FeedbackSettings, Templates
from vpd.feedback.rendering import ChatRenderer, surrounded
from vpd.feedback.texts import FeedbackTexts
from vpd.types import Messages, TeacherPrompt, content_text, is_plain_text

_ELISION = "\n[...]\n"

_REMEMBERED = 256
"""How many pieces of rendered chats keep their tokens at most."""


class PromptBuilder:
    """Turns tasks and feedback texts into the student's and the teacher's prompts.

    Args:
        tokenizer: A tokenizer with a chat template.
        settings: The templates and the limit of the teacher's prompt.
        max_prompt_length: The largest number of tokens that the student's prompt may have.
        chat_template_kwargs: Arguments for the chat template, the same for student and teacher. A thinking mode that is
            on in one prompt and off in the other would make their first tokens incomparable.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: FeedbackSettings,
        max_prompt_length: int,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.max_prompt_length = max_prompt_length
        self._render = ChatRenderer(tokenizer, chat_template_kwargs or {})
        # The teacher's prompts of a group share the question and the templates' words.
        self._remembered: dict[str, list[int]] = {}

    def student(self, prompt: Messages) -> list[int]:
        """Turn the task's chat, or its plain text, into token ids, ready for the completion to follow.

        Raises:
            ConfigError: The chat is longer than ``max_prompt_length``.
        """
        ids = [*self._opening(prompt), *self._encode(self._render(prompt))]
        if len(ids) > self.max_prompt_length:
            raise ConfigError(
                f"A prompt has {len(ids)} tokens, more than rollout.max_prompt_length = {self.max_prompt_length}: "
                f"raise the limit or drop the task. It begins: {str(prompt[-1].get('content'))[:80]!r}."
            )
        return ids

    def chat(self, messages: Messages) -> list[int] | None:
        """Turn a chat whose content is data into token ids; None for a chat longer than the teacher's limit.

        Special tokens inside the messages stay plain text.

        Raises:
            ConfigError: The chat template does not write a message's content as it stands.
        """
        marks = [_unused_mark(f"message-{index}", messages) for index in range(len(messages))]
        rendered = self._render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
        contents = {mark: content_text(message["content"]) for mark, message in zip(marks, messages, strict=True)}
        ids: list[int] = []
        for piece in _cut(rendered, marks):
            ids += self._encode(contents.get(piece, piece), as_data=piece in contents)
        return ids if len(ids) <= self.settings.max_prompt_length else None

    def teacher(self, prompt: Messages, texts: FeedbackTexts) -> TeacherPrompt:
        """Append solution and feedback to the chat's last user message, or to the plain text.

        The texts are tokenised apart from the chat, and special tokens inside them stay plain text. If the whole is
        longer than ``settings.max_prompt_length``, only the texts are shortened, in their middle.

        Raises:
            ConfigError: The chat without the texts is already longer than the limit, its last message is not the
                user's, or the chat template does not write the texts as they stand.
        """
        pieces, slots = self._teacher_pieces(prompt, texts)
        opening = self._opening(prompt)
        encoded = [self._encode(piece, as_data=index in slots) for index, piece in enumerate(pieces)]
        fixed = len(opening) + sum(len(ids) for index, ids in enumerate(encoded) if index not in slots)
        room = self.settings.max_prompt_length - fixed
        if room < 0:
            raise ConfigError(
                f"The teacher's prompt has {fixed} tokens before any feedback, more than feedback.max_prompt_length = "
                f"{self.settings.max_prompt_length}: raise the limit or drop the task."
            )
        elision = self._encode(_ELISION, as_data=True)
        for index, share in zip(slots, fair_shares([len(encoded[i]) for i in slots], room), strict=True):
            encoded[index] = elide_middle(encoded[index], share, elision)
        ids = [token for piece in [opening, *encoded] for token in piece]
        return TeacherPrompt(ids, str(self.tokenizer.decode(ids)))

    def completion(self, text: str, end_of_sequence: int) -> list[int]:
        """Turn an answer into the token ids that the policy would write, closed by ``end_of_sequence``."""
        return [*self._encode(text, as_data=True), end_of_sequence]

    def _teacher_pieces(self, prompt: Messages, texts: FeedbackTexts) -> tuple[list[str], list[int]]:
        """Render the chat and cut it at the slots; returns all pieces and the indices of those that fill a slot."""
        if not prompt or not (prompt[-1].get("role") == "user" or is_plain_text(prompt)):
            raise ConfigError("A task's prompt must end with a user message, since feedback is appended to it.")
        marks = {"solution": _unused_mark("solution", prompt), "feedback": _unused_mark("feedback", prompt)}
        templates = self.settings.templates
        solution = (
            _section(templates.critique, texts.critique, marks["solution"])
            if texts.solution is None
            else _section(templates.solution, texts.solution, marks["solution"])
        )
        feedback = _section(_feedback_template(templates, texts), texts.feedback, marks["feedback"])
        before, after = (
            _fill(part, solution=solution, feedback=feedback) for part in templates.prompt.split("{prompt}")
        )
        content = surrounded(prompt[-1]["content"], before, after)
        rendered = self._render([*prompt[:-1], {**prompt[-1], "content": content}])
        values = {marks["solution"]: texts.solution or texts.critique, marks["feedback"]: texts.feedback}
        pieces, slots = [], []
        for piece in _cut(rendered, [mark for mark in marks.values() if mark in f"{solution}{feedback}"]):
            if piece in values:
                slots.append(len(pieces))
            pieces.append(values.get(piece, piece) or "")
        return pieces, slots

    def _opening(self, prompt: Messages) -> list[int]:
        """The special tokens that the tokenizer puts before a text; a chat's are written by the chat template."""
        return list(self.tokenizer("")["input_ids"]) if is_plain_text(prompt) else []

    def _encode(self, text: str, *, as_data: bool = False) -> list[int]:
        if as_data:
            return self._tokenise(text, as_data)
        if text not in self._remembered:
            if len(self._remembered) == _REMEMBERED:
                self._remembered.clear()
            self._remembered[text] = self._tokenise(text, as_data)
        return list(self._remembered[text])

    def _tokenise(self, text: str, as_data: bool) -> list[int]:
        # The chat template writes the special tokens, so that the tokenizer must add none.
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_data)["input_ids"])


def fair_shares(lengths: list[int], room: int) -> list[int]:
    """Split ``room`` among texts so that short ones stay whole and long ones get equal parts."""
    shares = [0] * len(lengths)
    left = room
    for rank, index in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        shares[index] = min(lengths[index], left // (len(lengths) - rank))
        left -= shares[index]
    return shares


def elide_middle(ids: list[int], limit: int, elision: list[int]) -> list[int]:
    """Shorten to ``limit`` tokens: the beginning and the end with a mark between them, or the beginning alone."""
    if len(ids) <= limit:
        return ids
    kept = limit - len(elision)
    if kept < 2:
        return ids[:limit]
    return [*ids[: kept - kept // 2], *elision, *ids[len(ids) - kept // 2 :]]


def _feedback_template(templates: Templates, texts: FeedbackTexts) -> str:
    return templates.feedback_on_success if texts.is_success else templates.feedback_on_failure


def _section(template: str, text: str | None, mark: str) -> str:
    return "" if text is None else template.replace("{text}", mark)


def _fill(template: str, **values: str) -> str:
    # A single pass leaves braces inside a section's template alone.
    return re.sub(r"\{(solution|feedback)\}", lambda match: values[match[1]], template)


def _cut(rendered: str, marks: list[str]) -> list[str]:
    """Cut a rendered chat at the marks, which become pieces of their own; each must stand in it."""
    missing = [mark for mark in marks if mark not in rendered]
    if missing:
        raise ConfigError(
            f"The chat template does not write a message's content as it stands: it alters or drops {missing[0]!r}, "
            "behind which a text for the teacher or the critic would be lost. Use a chat template that leaves contents "
            "alone (no upper, truncate, urlencode or the like)."
        )
    return re.split(f"({'|'.join(map(re.escape, marks))})", rendered) if marks else [rendered]


def _unused_mark(name: str, prompt: Messages) -> str:
    text = str(prompt)
    number = 0
    while (mark := f"[[{name}-slot-{number}]]") in text:
        number += 1
    return mark
