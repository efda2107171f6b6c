"""The rewards' gradient, with answers of the teacher that the judge has confirmed: the default algorithm.

GRPO learns from groups in which some rollouts succeed and some fail. A group that fails as a whole teaches it nothing,
and there the feedback is worth most. So the teacher, which has read the feedback on one of the group's attempts,
answers the task once more, and its answer is judged as the student's are. A right one joins the group as if the student
had written it. The group then has a success to learn from, and its other rollouts a contrast:

    A_i = r_i - mean(r),   r over the group's rollouts and the teacher's right answers

In the terms of Variational Policy Distillation (arXiv 2605.15113), the teacher q(y|x,C) proposes samples of the
posterior over right answers, the judge accepts or rejects them, and the M-step raises the student's likelihood of what
was accepted. Nothing that the teacher says reaches the student unjudged, so that a teacher that cannot read its
feedback costs a few samples and does no harm. How many answers it may give follows from how many of its last ones were
right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from vpd.algorithms.base import ExampleBatch, Passes, UpdateResult
from vpd.algorithms.example import Example
from vpd.algorithms.policy_step import PolicyGradientAlgorithm, group_advantages, policy_step
from vpd.config import PolicyGradientSettings
from vpd.policy.learner import Learner

_MEMORY = 0.8
"""The share of the attempts counted so far that still counts a batch later."""


class VerifiedSettings(PolicyGradientSettings):
    """The default: rewards alone where they tell rollouts apart, and elsewhere the teacher's confirmed answers."""

    type: Literal["verified"] = "verified"  # pyright: ignore[reportIncompatibleVariableOverride]
    attempts_per_group: int = Field(default=1, ge=0)
    """How often, at most, the teacher answers the task of a group that failed as a whole, each time with the feedback
    on another of its rollouts; 0 is GRPO."""


class Verified(PolicyGradientAlgorithm[VerifiedSettings]):
    """GRPO on groups that the teacher's confirmed answers complete.

    ``memory`` counts, by source of feedback, the teacher's attempts and its successes; old ones fade.
    """

    settings_class = VerifiedSettings
    reads_feedback = True
    follows_teacher = False

    def second_attempts(self, learner: Learner, examples: Sequence[Example]) -> Sequence[int]:
        """Choose from groups that failed as a whole, by source: the larger its share of right answers, the more."""
        chosen: list[int] = []
        candidates = sorted(self._candidates(examples), key=lambda pair: pair[0])
        for source in dict.fromkeys(example.source for _, example in candidates):
            rollouts = [example.rollout for _, example in candidates if example.source == source]
            chosen += rollouts[: math.ceil(self._expected_share(source) * len(rollouts))]
        return sorted(chosen)

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        confirmed = [attempt for attempt in batch.second_attempts if attempt.is_success]
        # The same right answer, given twice, is learned once.
        distinct = {(attempt.group, tuple(attempt.completion)): attempt for attempt in confirmed}.values()
        examples = sorted([*batch.examples, *distinct], key=lambda example: example.group)
        advantages = group_advantages(examples, self.settings.scale_rewards)
        result = policy_step(learner, replace(batch, examples=examples), self.settings, advantages)
        tried, won = learner.total(len(batch.second_attempts), len(confirmed))
        metrics = {"second_attempts": tried, "second_attempt_success_rate": won / tried if tried else None}
        self._remember(learner, batch.second_attempts)
        return replace(result, metrics=result.metrics | metrics)

    def passes(self, prompts_per_step: int) -> Passes:
        """Count GRPO's passes: the teacher samples, and is never read."""
        return Passes(student_reads=1.0 + (self.settings.beta > 0))

    def _candidates(self, examples: Sequence[Example]) -> list[tuple[int, Example]]:
        """Return the rollouts to which the teacher may reply, each with its place among those of its group."""
        found = []
        for _, members in itertools.groupby(examples, key=lambda example: example.group):
            group = list(members)
            if not any(example.is_success for example in group):
                able = [example for example in group if example.has_teacher and len(example.turns) == 1]
                found += enumerate(able[: self.settings.attempts_per_group])
        return found

    def _expected_share(self, source: str | None) -> float:
        """Estimate the share of right answers by Laplace's rule, which begins at one half."""
        tried, won = (self.memory.get(f"{source}.{name}", 0.0) for name in ("attempts", "successes"))
        return (won + 1.0) / (tried + 2.0)

    def _remember(self, learner: Learner, attempts: Sequence[Example]) -> None:
        self.memory = {name: _MEMORY * count for name, count in self.memory.items()}
        for source in learner.union(attempt.source for attempt in attempts if attempt.source):
            own = [attempt for attempt in attempts if attempt.source == source]
            counts = learner.total(len(own), sum(attempt.is_success for attempt in own))
            for name, count in zip(("attempts", "successes"), counts, strict=True):
                self.memory[f"{source}.{name}"] = self.memory.get(f"{source}.{name}", 0.0) + count
