"""The base class of all environments: an environment has tasks in three splits, and a judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from vpd.types import Demonstration, Task, Verdict

if TYPE_CHECKING:
    from transformers import TrainerState

Split: TypeAlias = Literal["train", "selection", "final"]
SPLITS: tuple[Split, ...] = ("train", "selection", "final")


class Attempt(NamedTuple):
    """One completion that is to be judged.

    Attributes:
        task: The question.
        completion: The answer as text.
        completion_ids: The answer's token ids; empty where it was not sampled, as a demonstration is not.
    """

    task: Task
    completion: str
    completion_ids: Sequence[int] = ()


Judgements: TypeAlias = Sequence[Verdict | Exception]
"""Verdicts on a batch, with an exception in the place of each completion that the judge failed on."""


class Environment(ABC):
    """An environment brings tasks and judges completions.

    The three splits never overlap. A run learns from ``train``, may choose checkpoints and settings by ``selection``,
    and reports ``final``, which chooses nothing.

    Attributes:
        judges_on_main_thread: Whether a plain ``judge`` must run on the main thread, for example because it sets
            signal handlers. Otherwise it runs on a thread of its own, so that a run can go on without one that hangs.
        judges: Whether completions are judged at all. Without a judge no rollout has a verdict and nothing is
            evaluated, which only an algorithm can do with that asks for no verdict.
        judges_batches: Whether completions are judged together, by ``judge_batch`` on the main thread, and not one by
            one.
        trainer_state: The ``TrainerState`` of the run that the completions are judged for; None outside of a run.
    """

    judges_on_main_thread: bool = False
    judges: bool = True
    judges_batches: bool = False
    trainer_state: TrainerState | None = None

    @abstractmethod
    def tasks(self, split: Split) -> Sequence[Task]:
        """Return the tasks of a split: always the same ones, in the same order."""

    def stages(self) -> Sequence[Sequence[Task]]:
        """Return the train split in stages of rising difficulty (a curriculum); by default it is one stage.

        A run begins with the first stage and goes on to the next when enough of a batch succeeds
        (``rollout.next_stage_at``).
        """
        return [self.tasks("train")]

    @abstractmethod
    def judge(self, task: Task, completion: str) -> Verdict | Awaitable[Verdict]:
        """Grade one completion; the method may be plain or async.

        A completion that cannot be judged through its own fault (it is unreadable, or too slow) has failed: return
        reward 0 and a text that says so. Raise only where the judge itself is broken: the rollout then stays ungraded
        and is counted.
        """

    def judge_batch(self, attempts: Sequence[Attempt]) -> Judgements | Awaitable[Judgements]:
        """Grade all completions of a batch together; the method may be plain or async.

        It returns one verdict for each, or an exception in the place of a completion that the judge failed on.

        It is called only where ``judges_batches`` is true. Where it raises, no completion of the batch is graded.
        """
        raise NotImplementedError(f"{type(self).__name__}.judges_batches is true, but it has no judge_batch.")

    def truncated_feedback(self, task: Task) -> str:
        """Return what a completion that the length limit cut off is told; it follows the judge's own text."""
        return "Your answer was cut off at the length limit before it was finished. Answer more briefly."

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return up to ``count`` worked answers to tasks of the train split, for the warm start; by default none."""
        return []
