"""The journal of a run: it writes to the screen, to the run's folder, and to the trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from vpd.monitoring.progress import Progress
from vpd.runs.folder import RunFolder


class Journal:
    """The one place that lines, metrics and warnings go through; only the main process writes.

    Attributes:
        folder: The run's folder, on the main process once it is open; None elsewhere.
        progress: The display on the screen.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.folder: RunFolder | None = None
        self.progress = Progress()

    def say(self, text: str) -> None:
        """Show a line on the screen that stays."""
        if self._accelerator.is_main_process:
            self.progress.message(text)

    def log(self, step: int, event: str, values: Mapping[str, Any]) -> None:
        """Write a line to ``metrics.jsonl``."""
        if self.folder is not None:
            self.folder.log(step, event, values)

    def warn(self, name: str, text: str, step: int = 0) -> None:
        """Show a line on the screen, and write it to ``metrics.jsonl`` as the warning ``name``."""
        self.log(step, "warning", {"name": name, "text": text})
        self.say(f"Warning: {text}")

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Give the metrics of one rollout batch to the folder, the screen and the trackers."""
        self.log(step, "train", metrics)
        if self._accelerator.is_main_process:
            self.progress.step({"step": step, **metrics})
        self.track(step, metrics)

    def track(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers for the trackers."""
        self._accelerator.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def end_tracking(self) -> None:
        """Let the trackers write what they hold; what is logged later does not reach them."""
        # accelerate's own way out also destroys the process group, which evaluations after training need.
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers.clear()
