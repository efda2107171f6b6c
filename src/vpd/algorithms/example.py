"""Holds what the losses need to know of one rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vpd.policy.learner import View
from vpd.types import Rollout, TeacherView


@dataclass(frozen=True, slots=True)
class ExampleTurn:
    """One completion, conditioned on the student's prompt and, where there is one, on the teacher's.

    Attributes:
        student_prompt: The token ids that the student read.
        teacher_prompt: The token ids that the teacher reads; None where the turn has no teacher.
        completion: The token ids of the completion, the same for student and teacher.
    """

    student_prompt: list[int]
    teacher_prompt: list[int] | None
    completion: list[int]


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout that takes part in a loss.

    Attributes:
        rollout: The index of the rollout in the batch.
        group: The index of its prompt in the batch, counted over all processes.
        turns: The completions; one for a question and an answer, more for a conversation.
        reward: The reward that the environment gave; nan where there is no verdict.
        is_success: Whether the rollout counts as a success.
        source: The kind of feedback that the teacher reads; None where there is none.
    """

    rollout: int
    group: int
    turns: tuple[ExampleTurn, ...]
    reward: float
    is_success: bool
    source: str | None

    @property
    def has_teacher(self) -> bool:
        """Whether any turn has a teacher."""
        return any(turn.teacher_prompt is not None for turn in self.turns)

    @property
    def completion(self) -> list[int]:
        """The completion tokens of all turns, one turn after another."""
        return [token for turn in self.turns for token in turn.completion]


@dataclass(frozen=True, slots=True)
class PromptedCompletion:
    """A prompt with a completion to imitate, both as token ids."""

    prompt: list[int]
    completion: list[int]


imitated_view = View[PromptedCompletion](
    lambda pair: [(pair.prompt + pair.completion, len(pair.prompt))],
)
"""The completion, conditioned on its prompt."""

student_view = View[Example](
    lambda example: [(turn.student_prompt + turn.completion, len(turn.student_prompt)) for turn in example.turns]
)
"""Every turn's completion, conditioned on the student's prompt."""

teacher_view = View[Example](
    lambda example: [
        (turn.teacher_prompt + turn.completion, len(turn.teacher_prompt))
        for turn in example.turns
        if turn.teacher_prompt is not None
    ],
    as_teacher=True,
)
"""The completions of the turns that have a teacher, conditioned on the teacher's prompts."""


def make_examples(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    views: Sequence[TeacherView | None],
    mask_truncated: bool = False,
    graded_only: bool = True,
) -> list[Example]:
    """Select the rollouts that take part in a loss: those with a verdict and at least one completion token.

    Args:
        rollouts: The B rollouts of this process.
        is_success: Whether each rollout has succeeded [B].
        views: The teacher's prompts for each rollout [B]; None where it has no feedback.
        mask_truncated: Whether rollouts that the length limit ended are left out, too.
        graded_only: Whether a verdict is needed; without one the reward is nan.
    """
    return [
        Example(
            rollout=index,
            group=rollout.group,
            turns=tuple(_turns(rollout, view)),
            reward=math.nan if rollout.verdict is None else rollout.verdict.reward,
            is_success=success,
            source=None if view is None else view.source,
        )
        for index, (rollout, success, view) in enumerate(zip(rollouts, is_success, views, strict=True))
        if rollout.completion_ids
        and not (graded_only and rollout.verdict is None)
        and not (mask_truncated and rollout.truncated)
    ]


def _turns(rollout: Rollout, view: TeacherView | None) -> Iterator[ExampleTurn]:
    """Yield the turns with at least one completion token."""
    prompts = [None] * len(rollout.turns) if view is None else view.turns
    for turn, prompt in zip(rollout.turns, prompts, strict=True):
        if turn.completion_ids:
            yield ExampleTurn(turn.prompt_ids, None if prompt is None else prompt.prompt_ids, turn.completion_ids)


def with_teacher(examples: Sequence[Example]) -> list[Example]:
    """Select the rollouts that have a teacher, reduced to the turns that have one."""
    return [
        replace(example, turns=tuple(turn for turn in example.turns if turn.teacher_prompt is not None))
        for example in examples
        if example.has_teacher
    ]
