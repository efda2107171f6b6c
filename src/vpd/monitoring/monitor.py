"""The monitor watches a run, warns of what goes wrong, and ends the run where the settings ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpd.monitoring.drift import drift_warnings, forget_beginning
from vpd.monitoring.journal import Journal
from vpd.monitoring.warnings import batch_warnings
from vpd.runs.state import TrainingState


class Monitor:
    """A run's monitor: it warns of what goes wrong, and ends the run where the settings ask for it.

    Args:
        journal: The run's journal, which shows and keeps the warnings.
        state: The run's state; the monitor sets its ``stopped_by``.
        sources: The names of the feedback sources; None where a batch without feedback teaches as much.
        stop_on: The names of the warnings that end the run.
        threshold: The reward from which a rollout succeeds; None where that goes by its group.
    """

    def __init__(
        self,
        journal: Journal,
        state: TrainingState,
        sources: Sequence[str] | None,
        stop_on: Sequence[str],
        threshold: float | None = None,
    ) -> None:
        self._journal = journal
        self._state = state
        self._sources = sources
        self._stop_on = stop_on
        self._threshold = threshold

    def warn(self, name: str, text: str) -> None:
        """Say what is wrong, and stop the run where the settings ask for it."""
        self._journal.warn(name, text, self._state.step)
        if name in self._stop_on:
            self.stop(name)

    def stop(self, name: str) -> None:
        """Let the run end after the current batch."""
        self._state.stopped_by = name
        self._journal.say(f"Training ends here: {name}.")

    def begin_anew(self) -> None:
        """Compare the batches to come with the next ones: harder tasks begin, on which less succeeds."""
        forget_beginning(self._state.history)

    def watch(self, metrics: Mapping[str, float | None]) -> None:
        """Warn of what a batch's metrics show, alone or together with the batches before."""
        warnings = batch_warnings(metrics, self._sources, self._threshold)
        warnings |= drift_warnings(self._state.history, metrics)
        for name, text in warnings.items():
            self.warn(name, text)
