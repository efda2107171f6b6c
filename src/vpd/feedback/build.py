"""A batch of judged rollouts -> the teacher's prompt of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.sources import FeedbackSource, Group, choose_texts, make_sources
from vpd.feedback.texts import permute_across_groups
from vpd.types import Rollout, TeacherView


def build_views(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    prompts: PromptBuilder,
    *,
    sources: Sequence[FeedbackSource] | None = None,
    permute: bool = False,
) -> list[TeacherView | None]:
    """Build the teacher's prompt of each rollout.

    Args:
        rollouts: B rollouts, those of one group next to each other. An ungraded one (no verdict) takes no part: it
            gets no view and is nobody's sibling.
        is_success: B flags.
        prompts: templates and limits.
        sources: in order of preference; by default those of the templates' settings that need nothing else.
        permute: give each rollout the feedback of another task, for the control.

    Returns:
        B entries; None where there is no feedback.
    """
    graded = [index for index, rollout in enumerate(rollouts) if rollout.verdict is not None]
    members = [list(of_group) for _, of_group in groupby(graded, key=lambda index: rollouts[index].group)]
    groups = [Group([rollouts[i] for i in group], [is_success[i] for i in group]) for group in members]
    chosen = choose_texts(groups, make_sources(prompts.settings) if sources is None else sources)
    texts = [text for of_group in chosen for text in of_group]
    if permute:
        texts = permute_across_groups(texts, [rollouts[i].group for i in graded])
    views: list[TeacherView | None] = [None] * len(rollouts)
    for index, text in zip(graded, texts, strict=True):
        if text is not None:
            views[index] = prompts.teacher(rollouts[index].task.prompt, text)
    return views
