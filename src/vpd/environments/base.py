"""What an environment is: tasks in three splits, and a judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Literal, TypeAlias

from vpd.types import Demonstration, Task, Verdict

Split: TypeAlias = Literal["train", "selection", "final"]
SPLITS: tuple[Split, ...] = ("train", "selection", "final")


class Environment(ABC):
    """Where tasks come from and how a completion is judged.

    The three splits never overlap: ``train`` is learned from, ``selection`` may choose checkpoints and settings,
    ``final`` is reported and chooses nothing.

    Attributes:
        judges_on_main_thread: a plain ``judge`` may run nowhere else, because it sets signal handlers, say. Otherwise
            it runs on a thread of its own, so that a run can go on without one that hangs.
    """

    judges_on_main_thread: bool = False

    @abstractmethod
    def tasks(self, split: Split) -> Sequence[Task]:
        """The tasks of a split, always the same ones in the same order."""

    def stages(self) -> Sequence[Sequence[Task]]:
        """The train split in stages of rising difficulty, a curriculum; one stage by default.

        A run begins with the first stage and goes on to the next when enough of a batch succeeds
        (``rollout.next_stage_at``).
        """
        return [self.tasks("train")]

    @abstractmethod
    def judge(self, task: Task, completion: str) -> Verdict | Awaitable[Verdict]:
        """Grade one completion; plain or async.

        A completion that cannot be judged for its own fault (unreadable, too slow) has failed: return reward 0 and a
        text that says so. Raise only where the judge itself is broken: the rollout is then left ungraded and counted.
        """

    def truncated_feedback(self, task: Task) -> str:
        """What is said of a completion that the length limit cut off (a failure, whatever it held until then)."""
        return "Your answer was cut off at the length limit before it was finished. Answer more briefly."

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Up to ``count`` worked answers to tasks of the train split, for the warm start; none by default."""
        return []
