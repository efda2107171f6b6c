"""The seed of a batch reaches the sources, and draws other than the rollouts' own."""

from __future__ import annotations

from engines import ScriptedEngine
from test_texts import group
from tiny import tokenizer

from vpd.config import CritiqueSettings, FeedbackSettings, RolloutSettings
from vpd.feedback import FeedbackSource, PromptBuilder, SelfCritic, build_views, make_sources
from vpd.rollout import RolloutSampler


class Seeds(FeedbackSource):
    """Tells nothing and remembers the seeds that it was given."""

    name = "seeds"

    def __init__(self):
        self.seen = []

    def texts(self, groups):
        self.seen.append([group.seed for group in groups])
        return [[None] * len(group.rollouts) for group in groups]


def test_all_groups_of_a_batch_have_one_seed_that_is_not_the_rollouts_own():
    source, prompts = Seeds(), PromptBuilder(tokenizer(), FeedbackSettings(), 100)
    rollouts = [*group(0, 1), *group(0, 0, index=1)]
    for seed in (3, 4, 3):
        build_views(rollouts, [False, True, False, False], prompts, seed=seed, sources=[source])
    third, fourth, again = source.seen
    assert len(set(third)) == len(set(fourth)) == 1
    assert third == again != fourth
    assert 3 not in third


def test_a_critique_is_drawn_by_seed_and_place_whatever_was_sampled_before():
    settings = FeedbackSettings(sources=["critique"])
    prompts = PromptBuilder(tokenizer(), settings, 1000)
    sampler = RolloutSampler(
        ScriptedEngine(tokenizer()), tokenizer(), None, prompts, RolloutSettings(), eos_token_ids=(7,)
    )
    critic = SelfCritic(lambda chats, seed: sampler.answer(chats, CritiqueSettings(), seed))
    sources = make_sources(settings, critic)
    rollouts = group(*[0] * 6)

    def critiques(seed):
        return [
            view.first.text for view in build_views(rollouts, [False] * 6, prompts, seed=seed, sources=sources).views
        ]

    first, other, again = critiques(1), critiques(2), critiques(1)
    assert first == again != other
    assert len(set(first)) > 1, "places differ"
