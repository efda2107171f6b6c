"""Turns a batch of judged rollouts into the teacher's prompt of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from vpd.feedback.prompts import PromptBuilder
from vpd.feedback.sources import FeedbackSource, Group, choose_texts, make_sources
from vpd.feedback.tally import Tally
from vpd.feedback.texts import permute_across_groups
from vpd.seeds import mix
from vpd.types import Rollout, TeacherView

_OF_SOURCES = 1
"""Tells the sources' seed apart from the batch's, with which the rollouts themselves were sampled: draws by the same
seed, at the same places, would be the same."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """The teacher's prompts of a batch.

    Attributes:
        views: The teacher's prompt of each rollout, B entries; None where there is no feedback.
        tally: What the sources have counted for this batch.
    """

    views: list[TeacherView | None]
    tally: Tally


def build_views(
    rollouts: Sequence[Rollout],
    is_success: Sequence[bool],
    prompts: PromptBuilder,
    *,
    seed: int,
    sources: Sequence[FeedbackSource] | None = None,
    permute: bool = False,
) -> Feedback:
    """Build the teacher's prompt of each rollout.

    Args:
        rollouts: The B rollouts, those of one group next to each other. An ungraded rollout (no verdict) takes no part:
            it gets no view and is nobody's sibling.
        is_success: Whether each rollout has succeeded, B flags.
        prompts: The templates and limits.
        seed: The seed of the batch, from which that of the sources is made.
        sources: The sources in order of preference; by default those of the templates' settings that need nothing else.
        permute: Give each rollout the feedback of another task, as a control.
    """
    sources = make_sources(prompts.settings) if sources is None else sources
    graded = [index for index, rollout in enumerate(rollouts) if rollout.verdict is not None]
    members = [list(of_group) for _, of_group in groupby(graded, key=lambda index: rollouts[index].group)]
    source_seed = mix(seed, _OF_SOURCES)
    groups = [Group([rollouts[i] for i in group], [is_success[i] for i in group], source_seed) for group in members]
    before = _total(sources)
    chosen = choose_texts(groups, sources)
    tally = _total(sources) - before
    texts = [text for of_group in chosen for text in of_group]
    if permute:
        texts = permute_across_groups(texts, [rollouts[i].group for i in graded])
    views: list[TeacherView | None] = [None] * len(rollouts)
    for index, text in zip(graded, texts, strict=True):
        if text is not None:
            # The feedback is on the whole rollout; it is told with the task, before the first turn.
            first = prompts.teacher(rollouts[index].task.prompt, text)
            views[index] = TeacherView([first, *[None] * (len(rollouts[index].turns) - 1)], text.source)
    return Feedback(views, tally)


def _total(sources: Sequence[FeedbackSource]) -> Tally:
    return sum((source.tally() for source in sources), Tally())
