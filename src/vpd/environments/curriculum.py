"""Says which tasks a rollout batch holds, by the order within a stage and the stages of a curriculum."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from vpd.types import Task


class Curriculum:
    """Goes through the tasks of one stage after another, epoch by epoch.

    Args:
        stages: The tasks of each stage, in rising difficulty; each stage holds at least one task.
        prompts_per_step: How many tasks a rollout batch holds.
        next_stage_at: The share of successes in a batch from which the next stage begins.
        seed: The seed of the order within an epoch.

    Attributes:
        stages: The tasks of each stage.
        stage: The index of the current stage, from 0.
        stage_start: How many rollout batches were done before it began.
    """

    def __init__(
        self, stages: Sequence[Sequence[Task]], prompts_per_step: int, next_stage_at: float, seed: int
    ) -> None:
        self.stages = [list(stage) for stage in stages]
        self.stage = 0
        self.stage_start = 0
        self._prompts_per_step = prompts_per_step
        self._next_stage_at = next_stage_at
        self._seed = seed

    def tasks_of_step(self, step: int) -> list[Task]:
        """Choose the tasks of rollout batch ``step``, counted from 1, from the current stage."""
        stage = self.stages[self.stage]
        batch = step - 1 - self.stage_start
        orders: dict[int, list[int]] = {}
        tasks = []
        for position in range(batch * self._prompts_per_step, (batch + 1) * self._prompts_per_step):
            epoch, place = divmod(position, len(stage))
            if epoch not in orders:
                orders[epoch] = list(range(len(stage)))
                random.Random(f"{self._seed}-{epoch}").shuffle(orders[epoch])
            tasks.append(stage[orders[epoch][place]])
        return tasks

    def advance(self, step: int, success_rate: float | None) -> bool:
        """Go on to the next stage if enough of batch ``step`` succeeded, and return whether a stage begins.

        Args:
            step: The number of the rollout batch that was done last.
            success_rate: The share of successes over all processes; None where nothing could be graded.
        """
        is_last = self.stage + 1 == len(self.stages)
        if is_last or success_rate is None or success_rate < self._next_stage_at:
            return False
        self.stage += 1
        self.stage_start = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the curriculum, for a checkpoint."""
        return {"stage": self.stage, "stage_start": self.stage_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place that :meth:`state_dict` gave."""
        self.stage, self.stage_start = state["stage"], state["stage_start"]
