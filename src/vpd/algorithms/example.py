"""What the losses need to know of one rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpd.policy.learner import View
from vpd.types import Rollout, TeacherView


@dataclass(frozen=True, slots=True)
class Example:
    """A graded rollout: one completion behind the student's prompt and, where it has feedback, the teacher's.

    Attributes:
        rollout: index of the rollout in the batch.
        group: index of its prompt in the batch, counted over all processes.
        student_prompt: token ids.
        teacher_prompt: token ids; empty where there is no feedback.
        completion: token ids, the same for student and teacher; T of them.
        reward: the outcome.
        is_success: whether it counts as a success.
        source: the kind of feedback; None where there is none.
    """

    rollout: int
    group: int
    student_prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]
    reward: float
    is_success: bool
    source: str | None

    @property
    def has_teacher(self) -> bool:
        return self.source is not None


@dataclass(frozen=True, slots=True)
class Sequenced:
    """A prompt with a completion to imitate, both token ids."""

    prompt: list[int]
    completion: list[int]


whole_view = View[Sequenced](lambda sequence: (sequence.prompt + sequence.completion, len(sequence.prompt)))
"""The completion behind its prompt."""

student_view = View[Example](lambda example: (example.student_prompt + example.completion, len(example.student_prompt)))
"""The completion behind the student's prompt."""

teacher_view = View[Example](
    lambda example: (example.teacher_prompt + example.completion, len(example.teacher_prompt)), as_teacher=True
)
"""The completion behind the teacher's prompt."""


def make_examples(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    views: Sequence[TeacherView | None],
    mask_truncated: bool = False,
) -> list[Example]:
    """The graded rollouts with at least one token; the others take no part in any loss.

    With ``mask_truncated`` those that the length limit ended are left out too.
    """
    return [
        Example(
            rollout=index,
            group=rollout.group,
            student_prompt=rollout.prompt_ids,
            teacher_prompt=[] if view is None else view.prompt_ids,
            completion=rollout.completion_ids,
            reward=rollout.verdict.reward,
            is_success=success,
            source=None if view is None else view.source,
        )
        for index, (rollout, success, view) in enumerate(zip(rollouts, is_success, views, strict=True))
        if rollout.verdict is not None and rollout.completion_ids and not (mask_truncated and rollout.truncated)
    ]


def with_teacher(examples: Sequence[Example]) -> list[Example]:
    """Those that have feedback, and so a teacher."""
    return [example for example in examples if example.has_teacher]


def minibatches(examples: Sequence[Example], prompts: int | None, batch_prompts: int) -> list[list[Example]]:
    """Cut a batch into minibatches of ``prompts`` prompts with all their rollouts.

    Cut by the group's index over all processes, so that every process gets the same number of minibatches, some of
    them empty where it has no active rollout.

    Args:
        examples: of this process.
        prompts: per minibatch; None for one minibatch.
        batch_prompts: prompts of the whole batch, over all processes.
    """
    size = prompts or batch_prompts
    return [
        [example for example in examples if start <= example.group < start + size]
        for start in range(0, batch_prompts, size)
    ]
