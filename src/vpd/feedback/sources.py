"""The sources of feedback: the environment, successful siblings, a critic, or a class of your own.

    class Hint(FeedbackSource):
        name = "hint"

        def texts(self, groups):
            return [
                [FeedbackTexts(self.name, success, feedback="Read the question twice.") for success in group.is_success]
                for group in groups
            ]

Name it in the settings as ``feedback.sources = ["my_package.hints:Hint"]``, or give an object to
``VPDTrainer(feedback_sources=[...])``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vpd.config import ConfigError, FeedbackSettings
from vpd.feedback.critique import Critic
from vpd.feedback.tally import Tally
from vpd.feedback.texts import FeedbackTexts, without_thinking
from vpd.types import Rollout


@dataclass(frozen=True, slots=True)
class Group:
    """The graded rollouts of one prompt.

    Attributes:
        rollouts: The rollouts.
        is_success: Whether each of them has succeeded.
        seed: The seed for whatever a source draws for this batch; all groups of a batch have the same one.
    """

    rollouts: Sequence[Rollout]
    is_success: Sequence[bool]
    seed: int = 0


class FeedbackSource(ABC):
    """Writes what the teacher is told.

    Attributes:
        name: The kind of feedback, under which margins are reported.
    """

    name: str

    @abstractmethod
    def texts(self, groups: Sequence[Group]) -> list[list[FeedbackTexts | None]]:
        """Write what the teacher is told of each rollout.

        Args:
            groups: The groups that no source before this one has served.

        Returns:
            For each group one entry for each of its rollouts, None where there is nothing to tell. A group that has
            only None goes on to the next source.
        """

    def tally(self) -> Tally:
        """The running totals of all calls so far; what a batch adds to them is among its step's metrics."""
        return Tally()


class EnvironmentSource(FeedbackSource):
    """The verifier's own text."""

    name = "environment"

    def texts(self, groups: Sequence[Group]) -> list[list[FeedbackTexts | None]]:
        return [
            [
                FeedbackTexts(self.name, success, feedback=text) if (text := environment_text(rollout)) else None
                for rollout, success in zip(group.rollouts, group.is_success, strict=True)
            ]
            for group in groups
        ]


class SiblingSource(FeedbackSource):
    """One successful completion of the group for everyone, a second one for its own author.

    Few distinct solutions mean few distinct teacher prompts, which packing then computes once for all. A lone success
    has no sibling and stays without feedback.

    Args:
        shortest: Show the shortest success rather than the first.
        show_feedback: Show the environment's text too.
    """

    name = "sibling"

    def __init__(self, shortest: bool = False, show_feedback: bool = False) -> None:
        self._shortest = shortest
        self._show_feedback = show_feedback

    def texts(self, groups: Sequence[Group]) -> list[list[FeedbackTexts | None]]:
        return [self._of_group(group) for group in groups]

    def _of_group(self, group: Group) -> list[FeedbackTexts | None]:
        successes = [index for index, success in enumerate(group.is_success) if success]
        if self._shortest:
            successes.sort(key=lambda index: len(group.rollouts[index].completion_ids))
        texts: list[FeedbackTexts | None] = []
        for index, (rollout, success) in enumerate(zip(group.rollouts, group.is_success, strict=True)):
            sibling = next((other for other in successes if other != index), None)
            texts.append(
                None
                if sibling is None
                else FeedbackTexts(
                    self.name,
                    success,
                    solution=without_thinking(group.rollouts[sibling].text),
                    feedback=environment_text(rollout) if self._show_feedback else None,
                )
            )
        return texts


class CritiqueSource(FeedbackSource):
    """A critic's words for failures, and the environment's text for successes, where there is nothing to criticise.

    A group that has no failure, or whose critiques all fail, gets no feedback from this source.

    Args:
        critic: Writes the critiques.
    """

    name = "critique"

    def __init__(self, critic: Critic) -> None:
        self._critic = critic
        self._tally = Tally({"critiques": 0.0, "critiques_missing": 0.0})

    def texts(self, groups: Sequence[Group]) -> list[list[FeedbackTexts | None]]:
        failures = [
            rollout
            for group in groups
            for rollout, success in zip(group.rollouts, group.is_success, strict=True)
            if not success
        ]
        remaining = iter(self._write(failures, groups[0].seed) if failures else [])
        return [
            self._of_group(group, [None if success else next(remaining) for success in group.is_success])
            for group in groups
        ]

    def tally(self) -> Tally:
        return self._tally

    def _write(self, failures: Sequence[Rollout], seed: int) -> list[str | None]:
        answers = self._critic.write(failures, seed)
        missing = sum(not critique for critique in answers.texts)
        self._tally += Tally(
            counts={"critiques": len(answers.texts), "critiques_missing": missing},
            seconds={"critique": answers.seconds},
            token_count=answers.token_count,
        )
        return answers.texts

    def _of_group(self, group: Group, critiques: Sequence[str | None]) -> list[FeedbackTexts | None]:
        if not any(critiques):
            return [None] * len(critiques)
        texts: list[FeedbackTexts | None] = []
        for rollout, success, critique in zip(group.rollouts, group.is_success, critiques, strict=True):
            feedback = environment_text(rollout) if success else None
            told = FeedbackTexts(self.name, success, feedback=feedback, critique=critique)
            texts.append(told if critique or feedback else None)
        return texts


def make_sources(settings: FeedbackSettings, critic: Critic | None = None) -> list[FeedbackSource]:
    """Make the sources that the settings name, in their order; ``critique`` is left out where there is no critic.

    Raises:
        ConfigError: A class of your own cannot be imported or made.
    """
    sources: list[FeedbackSource] = []
    for name in settings.sources:
        if name == "environment":
            sources.append(EnvironmentSource())
        elif name == "sibling":
            show_feedback = "environment" in settings.sources and not settings.feedback_only_without_solution
            sources.append(SiblingSource(settings.sibling == "shortest", show_feedback))
        elif name != "critique":
            sources.append(_own_source(name))
        elif critic is not None:
            sources.append(CritiqueSource(critic))
    return sources


def choose_texts(groups: Sequence[Group], sources: Sequence[FeedbackSource]) -> list[list[FeedbackTexts | None]]:
    """Choose what the teacher is told of each rollout of each group; None for a rollout without feedback.

    The whole group uses one source, the first that has something to say. If failures got one kind of feedback and
    successes another, the kind itself would tell them apart, and the teacher could learn that instead of reading.
    """
    chosen: list[list[FeedbackTexts | None]] = [[None] * len(group.rollouts) for group in groups]
    for source in sources:
        left = [index for index, texts in enumerate(chosen) if not any(texts)]
        for index, texts in zip(left, source.texts([groups[index] for index in left]), strict=True):
            chosen[index] = texts
    return chosen


def environment_text(rollout: Rollout) -> str | None:
    """The text of the environment's verdict on a rollout, or None."""
    return rollout.verdict.feedback if rollout.verdict is not None else None


def _own_source(name: str) -> FeedbackSource:
    module, _, attribute = name.partition(":")
    try:
        source = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(f"feedback.sources names {name!r}, which cannot be made: {error}") from error
    if not isinstance(source, FeedbackSource):
        raise ConfigError(f"feedback.sources names {name!r}, which is no vpd.feedback.FeedbackSource.")
    return source
