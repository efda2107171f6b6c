"""The texts that tell the teacher of a rollout, before they become tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)\s*", re.DOTALL)
# Some chat templates write the opening tag into the prompt, so that a completion holds the closing one alone.
_OPENED_BY_PROMPT = re.compile(r"\A(?:(?!<think).)*?</think(?:ing)?>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FeedbackTexts:
    """The texts for one rollout's teacher prompt.

    Attributes:
        source: The kind of feedback that the rollout's group uses.
        is_success: Whether the rollout has succeeded, which decides the template around ``feedback``.
        solution: A successful sibling's text, or None.
        critique: A critic's words about the attempt, or None.
        feedback: The environment's text, or None.
    """

    source: str
    is_success: bool
    solution: str | None = None
    feedback: str | None = None
    critique: str | None = None


def permute_across_groups(texts: Sequence[FeedbackTexts | None], groups: Sequence[int]) -> list[FeedbackTexts | None]:
    """Give each rollout the texts of a rollout of another group: the control that a reading teacher must fail.

    As many rollouts have feedback as before, unless one group alone has feedback: then no rollout can get another
    group's, and all are left without.

    Args:
        texts: The texts of each rollout.
        groups: The group of each rollout; rollouts of one group are neighbours.
    """
    having = [index for index, text in enumerate(texts) if text is not None]
    permuted: list[FeedbackTexts | None] = [None] * len(texts)
    if len({groups[index] for index in having}) < 2:
        return permuted
    # Groups are contiguous, so that a cyclic shift by the largest group's size moves every entry out of its own group,
    # unless that group holds more than half of all entries. Those few entries get the first entry of another group.
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
    """Remove thinking blocks, an unclosed last one included, so that the answer stays as a reader would see it."""
    return _THINKING.sub("", _OPENED_BY_PROMPT.sub("", text)).strip()
