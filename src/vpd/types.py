"""The values that travel through a run, and the legend of the dimension letters.

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
"""A chat in the form that ``tokenizer.apply_chat_template`` reads: ``[{"role": "user", "content": "..."}]``."""


@dataclass(frozen=True, slots=True)
class Task:
    """One question of an environment.

    Attributes:
        id: unique within the environment, across its splits.
        prompt: the chat shown to the student, as is. The last message is the user's.
        data: what the judge needs. Never shown to the student.
        reference: a right answer, for a critic or for demonstrations. Never shown to the student.
    """

    id: str
    prompt: Messages
    data: Mapping[str, Any] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the environment says of one completion.

    Attributes:
        reward: a finite number; the run's ``success_threshold`` (1.0) tells successes from failures.
        feedback: a text that diagnoses the completion, or None where there is nothing to say.
        details: whatever else is worth keeping with the sample (JSON-serialisable).
    """

    reward: float
    feedback: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A worked answer for supervised warm-up.

    Attributes:
        task: the question.
        completion: a right answer in the form the judge wants.
        attempt: a wrong answer to the same question, so that feedback on it can be made; None where the environment
            has no way to make one.
    """

    task: Task
    completion: str
    attempt: str | None = None


@dataclass(slots=True)
class Rollout:
    """One completion sampled from the student, with its verdict.

    Attributes:
        task: the question it answers.
        group: index of the prompt within the batch; rollouts of one group answer the same prompt.
        prompt_ids: the student's prompt as token ids.
        completion_ids: the sampled token ids, T of them, the end-of-sequence token included where one was sampled.
        log_probs: log-probability of each sampled token at the sampling temperature, before top-p, top-k or min-p
            cut the distribution; T of them. From the rollout engine: for logs, never for losses.
        truncated: the length limit ended it, not an end-of-sequence token or a stop string.
        text: the completion decoded without special tokens; what the judge sees.
        verdict: None while unjudged, or where the judge itself failed (then the rollout is ungraded).
    """

    task: Task
    group: int
    prompt_ids: list[int]
    completion_ids: list[int]
    log_probs: list[float]
    truncated: bool
    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The teacher's prompt for one rollout: the task with what is known about the attempt.

    Attributes:
        prompt_ids: token ids, ready for the completion to follow.
        text: the same as text, for people.
        source: the kind of feedback it carries, ``"environment"`` or ``"sibling"``.
    """

    prompt_ids: list[int]
    text: str
    source: str
