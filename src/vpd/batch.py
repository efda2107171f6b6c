"""One iteration's rollouts with all that belongs to them, and the rows that are kept of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from vpd.algorithms.base import TokenNumbers
from vpd.runs.samples import RolloutRecord
from vpd.types import Rollout, TeacherView


@dataclass
class Batch:
    """The rollouts of one iteration on this process, with what the teacher reads.

    Attributes:
        rollouts: The judged rollouts [B].
        is_success: Whether each rollout has succeeded [B].
        views: The teacher's prompts for each rollout [B]; None where it has no feedback.
        counts: The numbers that the feedback sources have counted, by name.
        token_count: How many tokens were sampled for the batch, critiques and second attempts included.
        seconds: The seconds of sampling, of judging and of critiques.
        second_attempts: What the teacher wrote where it tried once more, what it had read, and whether it succeeded.
    """

    rollouts: list[Rollout]
    is_success: list[bool]
    views: list[TeacherView | None]
    counts: Mapping[str, float]
    token_count: int
    seconds: dict[str, float]
    second_attempts: list[tuple[Rollout, TeacherView, bool]] = field(default_factory=list)

    def add_cost(self, token_count: int, seconds: Mapping[str, float]) -> None:
        """Count the tokens and the seconds of further sampling as the batch's."""
        self.token_count += token_count
        self.seconds = dict(Counter(self.seconds) + Counter(seconds))

    def records(self, step: int, tokens: Mapping[int, TokenNumbers], shows_teacher: bool) -> list[RolloutRecord]:
        """Make the rows to keep: the teacher's second attempts, then the student's rollouts.

        Args:
            step: The number of the rollout batch.
            tokens: The M-step's numbers, by the index of the rollout.
            shows_teacher: Whether what the teacher reads is kept with the student's rollouts.
        """
        tried = [
            RolloutRecord.from_rollout(step, rollout, view, author="teacher", is_success=success)
            for rollout, view, success in self.second_attempts
        ]
        return tried + [
            RolloutRecord.from_rollout(
                step,
                rollout,
                view if shows_teacher else None,
                is_success=self.is_success[i],
                **(asdict(tokens[i]) if i in tokens else {}),
            )
            for i, (rollout, view) in enumerate(zip(self.rollouts, self.views, strict=True))
        ]
