"""What the teacher is told, before it becomes tokens: which text each rollout of a group gets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vpd.config import FeedbackSettings
from vpd.types import Rollout

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)\s*", re.DOTALL)
# Some chat templates write the opening tag into the prompt, so that a completion holds the closing one alone.
_OPENED_BY_PROMPT = re.compile(r"\A(?:(?!<think).)*?</think(?:ing)?>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FeedbackTexts:
    """The texts for one rollout's teacher prompt.

    Attributes:
        source: the kind that the rollout's group uses.
        is_success: whether the rollout succeeded; picks the template around ``feedback``.
        solution: a successful sibling's text, or None.
        critique: what a critic wrote of the attempt, or None.
        feedback: the environment's text, or None.
    """

    source: str
    is_success: bool
    solution: str | None = None
    feedback: str | None = None
    critique: str | None = None


def choose_texts(
    group: Sequence[Rollout],
    is_success: Sequence[bool],
    settings: FeedbackSettings,
    critiques: Sequence[str | None] | None = None,
) -> list[FeedbackTexts | None]:
    """Choose what the teacher is told about each rollout of one group.

    The whole group uses one kind of source, the first of ``settings.sources`` that it has: were failures to get one
    kind and successes another, the kind itself would tell them apart and the teacher could learn that instead of
    reading. So a lone success, which has no sibling, stays without feedback in a group that uses siblings.

    Args:
        group: the graded rollouts of one prompt, B of them.
        is_success: B flags.
        settings: sources in order of preference.
        critiques: B texts on failed attempts, None where there is none.

    Returns:
        B entries; None for a rollout without feedback.
    """
    for source in settings.sources:
        if source == "sibling" and any(is_success) and len(group) > 1:
            return _sibling_texts(group, is_success, settings)
        if source == "environment" and any(_environment_text(rollout) for rollout in group):
            return [
                FeedbackTexts("environment", success, feedback=text) if (text := _environment_text(rollout)) else None
                for rollout, success in zip(group, is_success, strict=True)
            ]
        if source == "critique" and critiques is not None and any(critiques):
            return _critique_texts(group, is_success, critiques)
    return [None] * len(group)


def _critique_texts(
    group: Sequence[Rollout], is_success: Sequence[bool], critiques: Sequence[str | None]
) -> list[FeedbackTexts | None]:
    """Failures get their critique; successes, of which there is nothing to criticise, the environment's text."""
    texts: list[FeedbackTexts | None] = []
    for rollout, success, critique in zip(group, is_success, critiques, strict=True):
        feedback = _environment_text(rollout) if success else None
        written = None if success else critique
        has_any = bool(written or feedback)
        texts.append(FeedbackTexts("critique", success, feedback=feedback, critique=written) if has_any else None)
    return texts


def _sibling_texts(
    group: Sequence[Rollout], is_success: Sequence[bool], settings: FeedbackSettings
) -> list[FeedbackTexts | None]:
    """One successful completion for everyone, a second one for its own author.

    Few distinct solutions mean few distinct teacher prompts, which packing then computes once for all.
    """
    show_feedback = "environment" in settings.sources and not settings.feedback_only_without_solution
    successes = [index for index, success in enumerate(is_success) if success]
    if settings.sibling == "shortest":
        successes.sort(key=lambda index: len(group[index].completion_ids))
    texts: list[FeedbackTexts | None] = []
    for index, (rollout, success) in enumerate(zip(group, is_success, strict=True)):
        sibling = next((other for other in successes if other != index), None)
        texts.append(
            None
            if sibling is None
            else FeedbackTexts(
                "sibling",
                success,
                solution=without_thinking(group[sibling].text),
                feedback=_environment_text(rollout) if show_feedback else None,
            )
        )
    return texts


def permute_across_groups(texts: Sequence[FeedbackTexts | None], groups: Sequence[int]) -> list[FeedbackTexts | None]:
    """Give each rollout the texts of a rollout of another group: the control that a reading teacher must fail.

    The number of rollouts with feedback stays the same, unless one group alone has feedback: then nobody can get
    another's and all are left without.

    Args:
        texts: one entry a rollout.
        groups: the group of each rollout; rollouts of one group are neighbours.
    """
    having = [index for index, text in enumerate(texts) if text is not None]
    permuted: list[FeedbackTexts | None] = [None] * len(texts)
    if len({groups[index] for index in having}) < 2:
        return permuted
    # A cyclic shift by the largest group's size moves every entry out of its own group, as groups are contiguous,
    # unless that group holds more than half of all entries; those few are given the first entry of another group.
    shift = max(sum(groups[index] == group for index in having) for group in {groups[index] for index in having})
    for position, index in enumerate(having):
        donor = having[(position + shift) % len(having)]
        if groups[donor] == groups[index]:
            donor = next(other for other in having if groups[other] != groups[index])
        donated = texts[donor]
        assert donated is not None
        own = texts[index]
        assert own is not None
        permuted[index] = replace(donated, is_success=own.is_success)
    return permuted


def without_thinking(text: str) -> str:
    """Remove thinking blocks, an unclosed last one included; what is left is the answer as a reader would see it."""
    return _THINKING.sub("", _OPENED_BY_PROMPT.sub("", text)).strip()


def _environment_text(rollout: Rollout) -> str | None:
    return rollout.verdict.feedback if rollout.verdict is not None else None
