"""The values that go through a run, and the legend of the dimension letters.

A prompt enters as a :class:`Task`, the student answers it (:class:`Rollout`), the environment judges the answer
(:class:`Verdict`), and feedback turns the verdict into what the teacher reads (:class:`TeacherView`).

Dimension letters used in names and shapes throughout the package:

    B  rows: rollouts of a batch          T  tokens
    H  hidden width of the network        V  vocabulary
    N  rollouts of one prompt (a group)   K  keys of an attention block
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Messages: TypeAlias = list[dict[str, Any]]
"""A chat in the form that ``tokenizer.apply_chat_template`` reads: ``[{"role": "user", "content": "..."}]``.

A content is a text, or a list of parts: ``[{"type": "text", "text": "..."}]``."""


def content_text(content: Any) -> str:
    """Return the content of a message as one text; parts stand one a line."""
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else str(content)


PLAIN_TEXT = "text"
"""The role of the only message of a prompt that is no chat: its content is continued as it stands."""


def plain_text(text: str) -> Messages:
    """Make the prompt of a task that is no chat: the student continues the text, and no chat template is used."""
    return [{"role": PLAIN_TEXT, "content": text}]


def is_plain_text(prompt: Messages) -> bool:
    """Whether a prompt is a text to continue, and no chat."""
    return len(prompt) == 1 and prompt[0].get("role") == PLAIN_TEXT


@dataclass(frozen=True, slots=True)
class Task:
    """One question of an environment.

    Attributes:
        id: The name of the task, unique within the environment, across its splits.
        prompt: The chat that the student is shown, as it stands. The last message is the user's. A text that is to be
            continued without a chat is made by :func:`plain_text`.
        data: The values that the judge needs. The student never sees them.
        reference: A right answer, for a critic or for demonstrations. The student never sees it.
    """

    id: str
    prompt: Messages
    data: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The environment's judgement of one completion.

    Attributes:
        reward: A finite number. The run's ``success_threshold`` (1.0) tells successes from failures.
        feedback: A text that diagnoses the completion, or None where there is nothing to say.
        details: Whatever else is worth keeping with the sample (JSON-serialisable).
    """

    reward: float
    feedback: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A worked answer for supervised warm-up.

    Attributes:
        task: The question.
        completion: A right answer in the form that the judge wants.
        attempt: A wrong answer to the same question, so that feedback on it can be made; None where the environment
            has no way to make one.
    """

    task: Task
    completion: str
    attempt: str | None = None


@dataclass(slots=True)
class Turn:
    """One completion of a rollout, conditioned on everything that the student had read by then.

    Attributes:
        prompt_ids: The student's prompt as token ids. From the second turn on it mostly begins with the turn before it,
            prompt and completion. Where a chat template rewrites the history (and strips thinking, for example), it is
            simply another prompt.
        completion_ids: The sampled token ids [T], with the end-of-sequence token where one was sampled.
        log_probs: The log-probability of each sampled token [T] at the sampling temperature, before top-p, top-k or
            min-p cut the distribution. They come from the rollout engine and are for logs, never for losses.
        truncated: Whether the length limit ended the completion, and no end-of-sequence token or stop string did.
        text: The completion, decoded without the tokens that end a turn and without padding; other special tokens, such
            as ``<think>`` or ``<tool_call>`` in many tokenizers, stay as text.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    log_probs: list[float]
    truncated: bool
    text: str


@dataclass(slots=True)
class Rollout:
    """The student's completions for one task, in one turn or in several, with their verdict.

    Attributes:
        task: The question that it answers.
        group: The index of the prompt within the batch; rollouts of one group answer the same prompt.
        turns: The completions, at least one, in their order.
        verdict: The environment's verdict; None before there is one, or where the judge itself failed (the rollout is
            then ungraded).
    """

    task: Task
    group: int
    turns: list[Turn]
    verdict: Verdict | None = None

    @property
    def text(self) -> str:
        """The last turn's completion, which the judge sees."""
        return self.turns[-1].text

    @property
    def truncated(self) -> bool:
        """Whether the length limit ended any of the turns."""
        return any(turn.truncated for turn in self.turns)

    @property
    def completion_ids(self) -> list[int]:
        """The completion tokens of all turns, one turn after another."""
        return [token for turn in self.turns for token in turn.completion_ids]


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """The teacher's prompt for one completion.

    Attributes:
        prompt_ids: The token ids, ready for the completion to follow.
        text: The prompt as text, for people.
    """

    prompt_ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The teacher's prompts for one rollout: the task with what is known about the attempt.

    Attributes:
        turns: The prompt of each of the rollout's turns, at least one of them; None where a turn has no teacher.
        source: The kind of feedback that they carry, such as ``"environment"`` or ``"sibling"``.
    """

    turns: list[TeacherPrompt | None]
    source: str

    @property
    def first(self) -> TeacherPrompt:
        """The prompt of the first turn that has a teacher."""
        return next(prompt for prompt in self.turns if prompt is not None)
