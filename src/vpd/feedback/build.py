"""A batch of judged rollouts -> the teacher's prompt of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vpd.config import FeedbackSettings
from vpd.feedback.critique import Critic
from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.texts import choose_texts, permute_across_groups
from vpd.types import Rollout, TeacherView


def build_views(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    prompts: PromptBuilder,
    *,
    critic: Critic | None = None,
    permute: bool = False,
) -> list[TeacherView | None]:
    """Build the teacher's prompt of each rollout.

    Args:
        rollouts: B rollouts, those of one group next to each other. An ungraded one (no verdict) takes no part: it
            gets no view and is nobody's sibling.
        is_success: B flags.
        prompts: templates and limits.
        critic: writes about failed attempts, where ``critique`` is among the sources and a group takes it.
        permute: give each rollout the feedback of another task, for the control.

    Returns:
        B entries; None where there is no feedback.
    """
    texts = []
    graded = [index for index, rollout in enumerate(rollouts) if rollout.verdict is not None]
    groups = [list(members) for _, members in groupby(graded, key=lambda index: rollouts[index].group)]
    critiques = _critiques(rollouts, is_success, groups, prompts.settings, critic)
    for group in groups:
        texts += choose_texts(
            [rollouts[i] for i in group],
            [is_success[i] for i in group],
            prompts.settings,
            [critiques.get(i) for i in group],
        )
    if permute:
        texts = permute_across_groups(texts, [rollouts[i].group for i in graded])
    views: list[TeacherView | None] = [None] * len(rollouts)
    for index, text in zip(graded, texts, strict=True):
        if text is not None:
            views[index] = prompts.teacher(rollouts[index].task.prompt, text)
    return views


def _critiques(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    groups: Sequence[Sequence[int]],
    settings: FeedbackSettings,
    critic: Critic | None,
) -> dict[int, str | None]:
    """What the critic writes, all at once, of the failures of those groups that no source before it serves."""
    if critic is None or "critique" not in settings.sources:
        return {}
    before = settings.sources[: settings.sources.index("critique")]
    wanted: list[int] = []
    for group in groups:
        members, flags = [rollouts[i] for i in group], [is_success[i] for i in group]
        served = before and any(choose_texts(members, flags, settings.model_copy(update={"sources": before})))
        if not served:
            wanted += [index for index, success in zip(group, flags, strict=True) if not success]
    return dict(zip(wanted, critic.write([rollouts[i] for i in wanted]), strict=True)) if wanted else {}
