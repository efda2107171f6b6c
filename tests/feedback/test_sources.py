"""A feedback source of one's own, among the others."""

from __future__ import annotations

import pytest
from test_texts import group
from toy import toy_trainer

from vpd import ConfigError
from vpd.config import FeedbackSettings
from vpd.feedback import FeedbackSource, FeedbackTexts, Group, Tally, choose_texts, make_sources
from vpd.runs.folder import read_metrics


class Hint(FeedbackSource):
    """Knows something about groups that all failed."""

    name = "hint"

    def __init__(self):
        self.hints = 0

    def texts(self, groups):
        return [
            [None if any(g.is_success) else FeedbackTexts(self.name, False, feedback="Try again.") for _ in g.rollouts]
            for g in groups
        ]

    def tally(self):
        return Tally({"hints": self.hints})


def test_it_takes_its_place_in_the_order():
    groups = [Group(group(0, 1, 1), [False, True, True]), Group(group(0, 0), [False, False])]
    for order in (["sibling", f"{__name__}:Hint"], [f"{__name__}:Hint", "sibling"]):
        chosen = choose_texts(groups, make_sources(FeedbackSettings(sources=order)))
        assert [[text and text.source for text in texts] for texts in chosen] == [["sibling"] * 3, ["hint"] * 2]


def test_its_numbers_and_margins_are_among_the_metrics(tmp_path):
    class Always(Hint):
        def texts(self, groups):
            self.hints += sum(len(g.rollouts) for g in groups)
            return [[FeedbackTexts(self.name, s, feedback=f"{i}") for i, s in enumerate(g.is_success)] for g in groups]

    source = Always()
    toy_trainer(tmp_path, eval={"preflight_tasks": 2, "margin_tasks": 2}, feedback_sources=[source]).train()
    lines = [line for line in read_metrics(tmp_path) if line["event"] == "train"]
    # Hints for the batch's two prompts of four rollouts, and none of those for measurements before and in between.
    assert [line["hints"] for line in lines] == [8, 8]
    assert source.hints > 16
    assert lines[0]["margin_before_hint"] == lines[0]["margin_before"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("siblings", "package.module:Class"), ("nowhere:Hint", "nowhere"), ("vpd.config:VPDConfig", "no vpd.feedback")],
)
def test_a_name_that_is_none_is_told(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        toy_trainer(tmp_path, feedback={"sources": [name]})
