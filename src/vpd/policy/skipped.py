"""Counts the optimizer steps that are skipped because their loss or gradient is not finite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SkippedUpdates:
    """The skipped optimizer steps of a run; the same on all processes.

    Attributes:
        in_a_row: How many of the newest steps were skipped, without one in between that was made.
        in_batch: How many were skipped since :meth:`next_batch`.
    """

    in_a_row: int = 0
    in_batch: int = 0

    def note(self, skipped: bool) -> None:
        """Count one optimizer step, made or skipped."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.in_batch += skipped

    def metrics(self) -> dict[str, float]:
        """Return the metric of a rollout batch in which steps were skipped."""
        return {"skipped_updates": self.in_batch} if self.in_batch else {}

    def next_batch(self) -> int:
        """Begin to count for the next rollout batch, and return how many steps were skipped in this one."""
        count, self.in_batch = self.in_batch, 0
        return count
