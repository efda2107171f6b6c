"""The warnings of a run by name: they say why a batch teaches nothing, or what may go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_OTHER_SUCCESS = (
    "Where rewards are continuous, lower the threshold, or let success go by the group's mean "
    '(algorithm.success = "group").'
)


def batch_warnings(
    metrics: Mapping[str, float | None], sources: Sequence[str] | None, threshold: float | None = None
) -> dict[str, str]:
    """Return the warnings for the metrics of one training step, by name.

    Args:
        metrics: The step's metrics.
        sources: The names of the feedback sources; None where a batch without feedback teaches as much.
        threshold: The reward from which a rollout succeeds; None where that goes by its group.
    """
    warnings = {}
    lowest, highest = metrics.get("reward_min"), metrics.get("reward_max")
    differ = lowest is not None and highest is not None and lowest < highest
    misses_threshold = differ and threshold is not None and metrics.get("success_rate") == 0
    if misses_threshold:
        warnings["no_success"] = (
            f"The rewards of this batch differ, but none reaches algorithm.success_threshold = {threshold:g} (the "
            f"highest is {highest:.4g}), so that every rollout counts as a failure. {_OTHER_SUCCESS}"
        )
    if metrics.get("active_share") == 0 and sources is not None:
        if metrics.get("success_rate") is None:
            cause = "the judge failed on every rollout; the log above says how"
        elif misses_threshold:
            cause = "no reward reaches the threshold, as said above"
        elif "environment" not in sources and metrics.get("success_rate") == 0:
            cause = (
                'every rollout failed, and siblings need a success to show. Add the source "environment", make the '
                "tasks easier, or warm-start"
            )
        elif "sibling" not in sources:
            cause = 'the environment gave no text. Let it give one, or add the source "sibling"'
        else:
            cause = "no rollout got feedback: the environment gave no text, and no rollout has a successful sibling"
        warnings["nothing_to_learn"] = f"Nothing to learn from this batch: {cause}."
    elif metrics.get("e_step") == 0:
        cause = "the active rollouts all succeeded or all failed"
        if sources is not None and list(sources) == ["sibling"] and metrics.get("lone_success_groups") == 1:
            cause = "every group has exactly one success, which has no sibling, so that only failures are active"
        warnings["e_step_skipped"] = f"The E-step was skipped: {cause}."
    if metrics.get("grad_norm") == 0:
        warnings["zero_gradient"] = (
            "The gradient of this batch is zero: every group's rewards are equal, or student and teacher agree on "
            "every token. Tasks that are neither too easy nor too hard, or more rollouts a prompt "
            "(rollout.num_generations), make a difference to learn from."
        )
    first, mean = metrics.get("divergence_first"), metrics.get("divergence")
    if first is not None and mean is not None and first > max(1.0, 10 * mean):
        warnings["first_token"] = (
            f"Student and teacher are {first:.1f} nats apart at the first token, and {mean:.2f} on average: the two "
            "prompts seem to ask for different beginnings, such as thinking and not thinking. Both take "
            "model.chat_template_kwargs; look at them with vpd train --dry-run."
        )
    if metrics.get("clipped_share") == 1 and (metrics.get("grad_norm") or 0) > 100:
        warnings["clipped"] = (
            "The gradient's norm is above 100 and clipped at every update: the step's length is set by "
            "optim.learning_rate alone. Lower it if the reward falls."
        )
    return warnings


def fall_warning(start: float, accuracy: float, tasks: int) -> str | None:
    """Return the warning that training has made the policy clearly worse than it was; None where it has not.

    Clearly is by more than five points, and by more than twice the standard error of the difference.

    Args:
        start: The accuracy on the selection split before the first step; nan or negative where it is unknown.
        accuracy: The accuracy on the same questions now.
        tasks: How many questions there are.
    """
    if not start > 0 or not tasks:
        return None
    error = math.sqrt((start * (1 - start) + accuracy * (1 - accuracy)) / tasks)
    if not start - accuracy > max(0.05, 2 * error):
        return None
    return (
        f"The policy is worse than before training: {accuracy:.1%} of the selection split, against {start:.1%} at the "
        "start. What it learns does not help on other questions of this task: lower optim.learning_rate, or take "
        'algorithm.type = "verified" or "grpo", which learn from rewards.'
    )


def template_warning(low: float) -> str | None:
    """Return the warning that the teacher is clearly better even with the feedback of other tasks; None where not.

    Args:
        low: The lower end of the interval of the gap with the feedback of other tasks.
    """
    if not low > 0:
        return None
    return (
        "The teacher is ahead of the student with the feedback of other tasks, too: it gains from the template, not "
        "from what the text says. Let the text say more (data.feedback), or teach the model to read feedback by a warm "
        "start (warm_start.demonstrations)."
    )


def gap_warning(
    low: float, tasks_with_feedback: int, highest_reward: float | None = None, threshold: float | None = None
) -> str | None:
    """Return the warning that the teacher is not clearly better before training; None where it is.

    Args:
        low: The lower end of the gap's interval.
        tasks_with_feedback: How many tasks the gap was measured on.
        highest_reward: The highest reward of any completion, student's or teacher's; None where none was graded.
        threshold: The reward from which a completion succeeds; None where that goes by its group.
    """
    if highest_reward is not None and threshold is not None and highest_reward < threshold:
        return (
            f"In the pre-flight no completion reached algorithm.success_threshold = {threshold:g}, neither the "
            f"student's nor the teacher's (the highest reward was {highest_reward:.4g}), so that there are no "
            f"successes to compare them by. {_OTHER_SUCCESS} Where right answers do reach it, these tasks are too hard "
            "for the model as it is: easier ones or a warm start make a beginning."
        )
    if not tasks_with_feedback:
        return "In the pre-flight no rollout got any feedback, so there is nothing to distil."
    if low > 0:
        return None
    return (
        "The teacher is not clearly better than the student, so distilling it may do harm. Remedies: a warm start "
        "(warm_start.demonstrations), feedback that says more (data.feedback), or siblings' solutions "
        "(feedback.sources)."
    )
