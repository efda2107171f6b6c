"""How far the teacher is ahead of the student, before anything is trained.

The initial gap predicts the final gain (arXiv 2605.30070 reports R2 = 0.95): a teacher that is no better behind the
feedback prompt has nothing to hand down, and distilling it can only do harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vpd.evaluation.intervals import bootstrap_interval
from vpd.feedback import FeedbackSource, build_views
from vpd.rollout.sampler import RolloutSampler
from vpd.types import Rollout, Task


@dataclass(frozen=True, slots=True)
class Gap:
    """Accuracy sampled from the teacher's prompts minus that sampled from the student's, on the same tasks.

    Attributes:
        student_accuracy, teacher_accuracy: means over the tasks whose rollouts got feedback.
        gap: their difference; low, high its 95% bootstrap interval over tasks.
        n: tasks with feedback, of ``tasks`` asked.
    """

    student_accuracy: float
    teacher_accuracy: float
    gap: float
    low: float
    high: float
    n: int
    tasks: int


def measure_gap(
    sampler: RolloutSampler,
    tasks: Sequence[Task],
    num_generations: int,
    success_threshold: float,
    seed: int,
    sources: Sequence[FeedbackSource] | None = None,
    permute: bool = False,
) -> Gap:
    """Sample the student, give it feedback, and let the teacher answer once behind each feedback prompt.

    Args:
        sampler: engine, prompts and judge.
        tasks: of the selection split.
        num_generations: student rollouts a task; feedback from siblings needs 2 or more.
        success_threshold: the reward from which a completion succeeds.
        seed: of the completions.
        sources: of feedback; those of the prompts' settings by default.
        permute: give each rollout the feedback of another task.
    """
    rollouts = sampler.sample(tasks, num_generations, seed=seed)
    views = build_views(
        rollouts,
        [_succeeds(rollout, success_threshold) for rollout in rollouts],
        sampler.prompts,
        sources=sources,
        permute=permute,
    )
    active = [(rollout, view) for rollout, view in zip(rollouts, views, strict=True) if view is not None]
    answers = sampler.sample_behind(
        [view.prompt_ids for _, view in active], [rollout.task for rollout, _ in active], seed=seed + 1
    )
    student, teacher = defaultdict(list), defaultdict(list)
    for rollout in rollouts:
        if rollout.verdict is None:
            continue
        student[rollout.task.id].append(float(_succeeds(rollout, success_threshold)))
    for answer in answers:
        if answer.verdict is None:
            continue
        teacher[answer.task.id].append(float(_succeeds(answer, success_threshold)))
    pairs = [(fmean(student[id]), fmean(outcomes)) for id, outcomes in teacher.items()]
    if not pairs:
        nan = float("nan")
        return Gap(nan, nan, nan, nan, nan, 0, len(tasks))
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
    )


def _succeeds(rollout: Rollout, success_threshold: float) -> bool:
    return rollout.verdict is not None and rollout.verdict.reward >= success_threshold
