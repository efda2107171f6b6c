"""Makes the measurements of a run, and tells and logs them."""

from __future__ import annotations

from dataclasses import asdict

from vpd.config import EvalSettings
from vpd.environments import Split
from vpd.evaluation.accuracy import Evaluation
from vpd.evaluation.evaluator import Evaluator
from vpd.evaluation.gap import Gap
from vpd.monitoring.journal import Journal
from vpd.monitoring.monitor import Monitor
from vpd.monitoring.warnings import gap_warning, template_warning
from vpd.runs.files import RunError
from vpd.runs.state import TrainingState


class Measurements:
    """Measures the final table's rows, the accuracy on a split, and how far the teacher is ahead of the student.

    Args:
        evaluator: Asks the questions.
        journal: Tells the results.
        state: Holds the table's rows.
        monitor: Warns where the teacher is not ahead.
        settings: The settings that say how much to measure.
    """

    def __init__(
        self, evaluator: Evaluator, journal: Journal, state: TrainingState, monitor: Monitor, settings: EvalSettings
    ) -> None:
        self._evaluator = evaluator
        self._journal = journal
        self._state = state
        self._monitor = monitor
        self._settings = settings

    def row(self, name: str, train_seconds: float = 0.0) -> None:
        """Evaluate on the final split, for the table alone.

        Raises:
            RunError: The judge failed on everything before the first step, and would in training.
        """
        if self._settings.final_tasks == 0 or not self._evaluator.has_judge:
            return
        evaluation = self._evaluator.accuracy("final", self._settings.final_tasks)
        if not self._state.step and evaluation.ungraded and not evaluation.n:
            reason = evaluation.judge_error or "told by another process"
            raise RunError(f"The judge failed on every completion of the final split. The last reason: {reason}")
        row = {"name": name, **evaluation.summary(), "train_seconds": train_seconds}
        self._state.rows.append(row)
        self._journal.log(self._state.step, "eval", {"split": "final", **row, "outcomes": evaluation.outcomes})
        self._journal.say(
            f"Final split, {name}: {evaluation.accuracy:.1%} [{evaluation.low:.1%}, {evaluation.high:.1%}] of "
            f"{evaluation.n}, {evaluation.seconds:.0f} s."
        )

    def accuracy(self, split: Split, limit: int | None = None) -> Evaluation:
        """Evaluate on the first ``limit`` tasks of a split, outside the table."""
        evaluation = self._evaluator.accuracy(split, limit)
        outcomes = {"outcomes": evaluation.outcomes}
        self._journal.log(self._state.step, "eval", {"split": split, **evaluation.summary(), **outcomes})
        reward = "" if self._evaluator.threshold is not None else f", mean reward {evaluation.reward:.4g}"
        self._journal.say(
            f"{split.capitalize()} split at step {self._state.step}: {evaluation.accuracy:.1%} of "
            f"{evaluation.n}{reward}, {evaluation.seconds:.0f} s."
        )
        return evaluation

    def preflight(self) -> None:
        """Measure whether there is anything to distil, and warn where the teacher is not ahead of the student.

        Where the settings ask for it, the teacher is measured once more with the feedback of other tasks.
        """
        gap = self.gap("Pre-flight")
        if warning := gap_warning(gap.low, gap.n, gap.highest_reward, self._evaluator.threshold):
            self._monitor.warn("no_gap", warning)
        if self._settings.preflight_permuted:
            permuted = self.gap("With the feedback of other tasks", permute=True)
            if warning := template_warning(permuted.low):
                self._monitor.warn("template_only", warning)

    def gap(self, when: str, permute: bool = False) -> Gap:
        """Measure by how much the teacher's accuracy is above the student's.

        Args:
            when: The words that begin the line with the result.
            permute: Whether each rollout gets the feedback of another task, as a control.
        """
        gap = self._evaluator.gap(permute)
        self._journal.log(self._state.step, "gap_permuted" if permute else "gap", asdict(gap))
        if gap.n:
            form, what = (".1%", "") if self._evaluator.threshold is not None else (".4g", ", mean rewards")
            self._journal.say(
                f"{when}, {gap.n} of {gap.tasks} selection tasks have feedback{what}: teacher "
                f"{gap.teacher_accuracy:{form}}, student {gap.student_accuracy:{form}}, gap {gap.gap:+{form}} "
                f"[{gap.low:+{form}}, {gap.high:+{form}}]."
            )
        return gap
