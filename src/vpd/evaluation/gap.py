"""Measures the gap between teacher and student: how much better the network answers when it is given feedback.

The initial gap predicts the final gain (arXiv 2605.30070 reports R2 = 0.95). A teacher that is no better when it is
conditioned on the feedback has nothing to hand down, and distilling it can only do harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vpd.evaluation.intervals import bootstrap_interval
from vpd.feedback import FeedbackSource, build_views, successes
from vpd.rollout import RolloutSampler
from vpd.types import Rollout, Task


@dataclass(frozen=True, slots=True)
class Gap:
    """The teacher's accuracy minus the student's, both sampled, on the same tasks.

    Where success goes by the group, the mean reward stands in the place of the accuracy.

    Attributes:
        student_accuracy: The student's accuracy, averaged over the tasks whose rollouts got feedback.
        teacher_accuracy: The teacher's accuracy on the same tasks.
        gap: The teacher's accuracy minus the student's.
        low: The lower end of the gap's 95% bootstrap interval over tasks.
        high: The upper end of that interval.
        n: How many tasks got feedback.
        tasks: How many tasks were asked.
        highest_reward: The highest reward of any completion, student's or teacher's; None where none was graded.
    """

    student_accuracy: float
    teacher_accuracy: float
    gap: float
    low: float
    high: float
    n: int
    tasks: int
    highest_reward: float | None = None


def measure_gap(
    sampler: RolloutSampler,
    tasks: Sequence[Task],
    num_generations: int,
    success_threshold: float | None,
    seed: int,
    sources: Sequence[FeedbackSource] | None = None,
    permute: bool = False,
) -> Gap:
    """Sample the student, give it feedback, and let the teacher answer each of its prompts once.

    Args:
        sampler: Samples completions and has them judged.
        tasks: The tasks to ask.
        num_generations: How many rollouts of the student each task gets; feedback from siblings needs 2 or more.
        success_threshold: The reward from which a completion succeeds; None where that goes by its group.
        seed: The seed of the student's draws, from which the others are made.
        sources: The sources of feedback; by default those of the prompts' settings that need nothing else.
        permute: Whether each rollout gets the feedback of another task, as a control.
    """
    rollouts = sampler.sample(tasks, num_generations, seed=seed).rollouts
    is_success = successes(rollouts, success_threshold)
    views = build_views(rollouts, is_success, sampler.prompts, seed=seed, sources=sources, permute=permute).views
    active = [(rollout, view) for rollout, view in zip(rollouts, views, strict=True) if view is not None]
    answers = sampler.sample_teacher(
        [view.first.prompt_ids for _, view in active], [rollout.task for rollout, _ in active], seed=seed + 1
    ).rollouts
    student, teacher = _outcomes(rollouts, success_threshold), _outcomes(answers, success_threshold)
    pairs = [(fmean(student[id]), fmean(outcomes)) for id, outcomes in teacher.items()]
    highest = max((r.verdict.reward for r in (*rollouts, *answers) if r.verdict is not None), default=None)
    if not pairs:
        nan = float("nan")
        return Gap(nan, nan, nan, nan, nan, 0, len(tasks), highest)
    differences = [of_teacher - of_student for of_student, of_teacher in pairs]
    low, high = bootstrap_interval(differences)
    return Gap(
        student_accuracy=fmean(of_student for of_student, _ in pairs),
        teacher_accuracy=fmean(of_teacher for _, of_teacher in pairs),
        gap=fmean(differences),
        low=low,
        high=high,
        n=len(pairs),
        tasks=len(tasks),
        highest_reward=highest,
    )


def _outcomes(rollouts: Sequence[Rollout], success_threshold: float | None) -> dict[str, list[float]]:
    """Collect the outcomes of the graded rollouts by task id: 1 for a success and 0 for a failure, or the rewards."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.verdict is not None:
            reward = rollout.verdict.reward
            outcome = reward if success_threshold is None else float(reward >= success_threshold)
            outcomes[rollout.task.id].append(outcome)
    return outcomes
