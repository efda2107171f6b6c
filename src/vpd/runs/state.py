"""Holds the numbers from which a run goes on, besides weights and optimizer."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingState:
    """The numbers that a resumed run needs besides weights, optimizer, scheduler, curriculum and the callbacks' state.

    Attributes:
        step: How many rollout batches are done.
        train_seconds: How many seconds they took, without evaluations.
        skipped_e_steps: How many E-iterations had a batch of one class only.
        history: The numbers that :func:`vpd.monitoring.drift.drift_warnings` keeps.
        best_step: The step of the best evaluation on the selection split; -1 before there is one.
        best_accuracy: The accuracy of that evaluation, or its mean reward where success goes by the group; minus
            infinity before there is one.
        best_reward: The mean reward of that evaluation.
        start_accuracy: The accuracy of the first evaluation on the selection split, before the first step.
        evaluated_step: The step of the newest evaluation on the selection split; -1 before there is one.
        stale_evaluations: How many evaluations on the selection split came after it.
        stopped_by: The name of what ended the run before its time; None while nothing has.
        rows: The rows of the final table so far.
    """

    step: int = 0
    train_seconds: float = 0.0
    skipped_e_steps: int = 0
    history: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    best_accuracy: float = -math.inf
    best_reward: float = -math.inf
    start_accuracy: float = -1.0
    evaluated_step: int = -1
    stale_evaluations: int = 0
    stopped_by: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def note_evaluation(self, accuracy: float, reward: float) -> bool:
        """Count an evaluation on the selection split after the newest step, and tell whether it is the best so far.

        Where accuracies are equal, rewards decide. Where both are, the latest is the best, since it has learned more,
        though it counts as stale. Only to the weights before the first step nothing equal is better: training has to
        show that it helps.

        Args:
            accuracy: The accuracy, or the mean reward where success goes by the group; nan where nothing was graded.
            reward: The mean reward.
        """
        found, best = (accuracy, reward), (self.best_accuracy, self.best_reward)
        self.evaluated_step = self.step
        if self.step == 0:
            self.start_accuracy = accuracy
        is_better = not math.isnan(accuracy) and found > best
        self.stale_evaluations = 0 if is_better else self.stale_evaluations + 1
        if not (is_better or (found == best and self.best_step > 0)):
            return False
        self.best_accuracy, self.best_reward, self.best_step = accuracy, reward, self.step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return all fields, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the fields that :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)
