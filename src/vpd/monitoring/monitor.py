"""Says what goes wrong in a run, and ends it where the settings ask for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpd.monitoring.drift import drift_warnings
from vpd.monitoring.journal import Journal
from vpd.monitoring.warnings import batch_warnings
from vpd.runs.state import TrainingState


class Monitor:
    """Warnings of a run.

    Args:
        journal: where they are told.
        state: of the run; ``stopped_by`` is set here.
        sources: names of the feedback sources; None where a batch without feedback teaches as much.
        stop_on: names of the warnings that end the run.
    """

    def __init__(
        self, journal: Journal, state: TrainingState, sources: Sequence[str] | None, stop_on: Sequence[str]
    ) -> None:
        self._journal = journal
        self._state = state
        self._sources = sources
        self._stop_on = stop_on

    def warn(self, name: str, text: str) -> None:
        """Say what is wrong, and stop where the settings ask for it."""
        self._journal.warn(name, text, self._state.step)
        if name in self._stop_on:
            self.stop(name)

    def stop(self, name: str) -> None:
        """Let the run end after the batch under way."""
        self._state.stopped_by = name
        self._journal.say(f"Training ends here: {name}.")

    def watch(self, metrics: Mapping[str, float | None]) -> None:
        """Look at a batch's metrics, and at the run's course."""
        warnings = batch_warnings(metrics, self._sources) | drift_warnings(self._state.history, metrics)
        for name, text in warnings.items():
            self.warn(name, text)
