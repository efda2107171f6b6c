"""The display of a run that trains: a live line on a terminal, and one plain line per step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

_SHOWN = (
    ("reward", "reward", "{:.3g}"),
    ("active", "active_share", "{:.2f}"),
    ("margin", "margin", "{:+.2f}"),
    ("after E-step", "margin_after", "{:+.2f}"),
    ("divergence", "divergence", "{:.3g}"),
    ("grad norm", "grad_norm", "{:.3g}"),
    ("length", "length_mean", "{:.0f}"),
    ("tok/s", "tokens_per_second_rollout", "{:,.0f}"),
    ("trained tok/s", "tokens_per_second_train", "{:,.0f}"),
)
_SHOWN_LIVE = ("reward", "margin", "tok/s")
"""The metrics of the live line, which has room for 80 columns."""


class Progress:
    """The display of a training run's steps; as a context manager, it stops on leaving.

    Args:
        console: The console to write to, by default standard output. The display is live where it is a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._began = time.monotonic()
        self._started_at = self._began
        self._max_seconds = math.inf
        self._total = 0
        self._first = 0
        self._done = 0
        self._trained = 0.0
        self._bar: Bar | None = None

    def start(self, total_steps: int, completed: int = 0, max_seconds: float = math.inf) -> None:
        """Begin to show training, which ends after ``total_steps`` or ``max_seconds`` from now, whichever is first.

        Args:
            total_steps: The number of rollout batches.
            completed: How many of them a resumed run has done before.
            max_seconds: The time limit of training, in seconds.
        """
        self.stop()
        self._max_seconds = max_seconds
        self._total, self._first, self._done = total_steps, completed, completed
        self._started_at = time.monotonic()
        self._trained = 0.0
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=18),
                TextColumn("{task.fields[numbers]}", markup=False),
                TextColumn("{task.fields[left]}", markup=False),
                console=self._console,
                refresh_per_second=2,
            )
            self._bar.add_task("train", total=total_steps, completed=completed, numbers="", left="")
            self._bar.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show that one more step is done; a metric that is missing or None is left out."""
        self._done = int(metrics.get("step") or self._done + 1)
        self._trained += metrics.get("seconds") or 0.0
        if self._bar is not None:
            numbers = _numbers(metrics, _SHOWN_LIVE)
            self._bar.update(self._bar.task_ids[0], completed=self._done, numbers=numbers, left=self._left())
        else:
            parts = (f"step {self._done}/{self._total}", _numbers(metrics), self._left())
            self.message(" ".join(part for part in parts if part))

    def message(self, text: str) -> None:
        """Show a line that stays."""
        # Without these options rich would read brackets as markup, and wrap the lines of a log file.
        elapsed = time.monotonic() - self._began
        self._console.print(f"[{elapsed:6.1f}s] {text}", markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the live display; may be called more than once."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _left(self) -> str:
        here = self._done - self._first
        remaining = self._total - self._done
        if here <= 0 or remaining <= 0:
            return ""
        elapsed = time.monotonic() - self._started_at
        # The limit is one of training alone, while evaluations take their time too.
        training_left = (self._max_seconds - self._trained) * max(
            1.0, elapsed / self._trained if self._trained else 1.0
        )
        left = min(elapsed / here * remaining, training_left)
        return f"{duration(left)} left" if left >= 1 else "training ends soon"


def duration(seconds: float) -> str:
    """Write a time for people: ``42s``, ``3m 20s``, ``5h 02m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _numbers(metrics: Mapping[str, Any], labels: tuple[str, ...] | None = None) -> str:
    parts = []
    for label, key, form in _SHOWN:
        value = metrics.get(key)
        if (labels is None or label in labels) and isinstance(value, int | float) and math.isfinite(value):
            parts.append(f"{label} {form.format(value)}")
    return " ".join(parts)
