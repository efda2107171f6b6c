"""GRPO and its mixtures with a teacher share advantages within groups and the policy-gradient update.

All graded rollouts take part; the teacher enters only where a rollout has feedback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vpd.algorithms.base import Algorithm, ExampleBatch, Passes, UpdateResult
from vpd.algorithms.example import Example, student_view, teacher_view, with_teacher
from vpd.algorithms.m_step import distilling, pack_both, token_numbers
from vpd.algorithms.minibatches import (
    Minibatch,
    by_rollout,
    plan_minibatches,
    run_minibatches,
    token_weights,
    tokens_with_teacher,
)
from vpd.algorithms.teacher import Teacher, make_teacher
from vpd.config import MStepSettings, PolicyGradientSettings
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner, TrainingPass
from vpd.policy.objectives import Objective, PolicyGradient, TokenLogProbs, WeightedSum
from vpd.timing import Timer

S = TypeVar("S", bound=PolicyGradientSettings)

Shaping = Callable[[Tensor, Tensor], Tensor]
"""Makes advantages [S] from advantages [S] and the log-ratio log q - log pi [S], which is 0 without a teacher."""


@dataclass(frozen=True)
class Distillation:
    """Adds the M-step's loss as a second term.

    Attributes:
        reward_weight: The weight of GRPO's loss.
        weight: The weight of the M-step's loss.
        settings: The M-step's settings.
    """

    reward_weight: float
    weight: float
    settings: MStepSettings


class PolicyGradientAlgorithm(Algorithm[S]):
    """An algorithm whose update is one :func:`policy_step`."""

    def weight_copies(self) -> Mapping[str, float]:
        """Ask for the initial model where there is a penalty for leaving it."""
        return {INITIAL: 0.0} if self.settings.beta > 0 else {}

    def passes(self, prompts_per_step: int) -> Passes:
        """Count the reads of log-probabilities: before the update, and under the initial model for the penalty."""
        return Passes(student_reads=1.0 + (self.settings.beta > 0), teacher_reads=int(self.reads_feedback))

    def update(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        timer = Timer()
        with timer("m_step"):
            result = self.step(learner, batch)
        result.seconds = dict(timer.seconds)
        return result

    def step(self, learner: Learner, batch: ExampleBatch) -> UpdateResult:
        """Make the update, which is GRPO's by default; the caller times it."""
        advantages = group_advantages(batch.examples, self.settings.scale_rewards)
        return policy_step(learner, batch, self.settings, advantages)


def group_advantages(examples: Sequence[Example], scale_rewards: bool) -> dict[int, Tensor]:
    """Compute the reward's distance from its group's mean for each completion token [T], by rollout index.

    With ``scale_rewards`` it is divided by the group's standard deviation, plus 1e-4 as TRL has it.
    """
    advantages = {}
    for _, members in itertools.groupby(examples, key=lambda example: example.group):
        group = list(members)
        rewards = torch.tensor([example.reward for example in group], dtype=torch.float32)
        centred = rewards - rewards.mean()
        if scale_rewards and len(group) > 1:
            centred = centred / (rewards.std() + 1e-4)
        for example, value in zip(group, centred, strict=True):
            advantages[example.rollout] = value.expand(len(example.completion))
    return advantages


def policy_step(
    learner: Learner,
    batch: ExampleBatch,
    settings: PolicyGradientSettings,
    advantages: Mapping[int, Tensor],
    *,
    shaping: Shaping | None = None,
    distillation: Distillation | None = None,
) -> UpdateResult:
    """Make one optimizer step for each minibatch on GRPO's objective.

    Args:
        learner: The policy.
        batch: The rollouts, of which all graded ones take part.
        settings: The aggregation, the minibatch and the clipping.
        advantages: The advantage of each completion token [T], by rollout index.
        shaping: The rule by which the teacher changes the advantages; None reads no teacher.
        distillation: The M-step's loss as a second term; None leaves it out.
    """
    examples = batch.examples
    old = by_rollout(examples, learner.token_log_probs(examples, student_view))
    reference = None
    if settings.beta:
        initial = learner.copies[INITIAL].module
        reference = by_rollout(examples, learner.token_log_probs(examples, student_view, initial))
    teacher = None if distillation is None else make_teacher(distillation.settings)
    planned = plan_minibatches(
        learner,
        examples,
        settings.m_minibatch_prompts,
        batch.prompts,
        scored=teacher_view if shaping is not None or teacher is not None else None,
        conditioned=teacher is not None and teacher.reuses_keys(learner),
        wants_layers=distillation is not None and distillation.settings.representation_weight > 0,
    )
    # With one update a batch the student is the one that wrote the rollouts.
    is_whole = settings.m_minibatch_prompts is None or settings.m_minibatch_prompts >= batch.prompts

    def make_pass(part: list[Example], minibatch: Minibatch) -> TrainingPass:
        gradient = PolicyGradient(
            advantages=_of_tokens(part, advantages),
            old_log_probs=_of_tokens(part, old),
            token_weights=token_weights(part, settings.loss_aggregation, minibatch.counts),
            temperature=learner.temperature,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            shaping=shaping,
            teacher_log_probs=None if shaping is None else _teacher_log_probs(learner, part),
            reference_log_probs=None if reference is None else _of_tokens(part, reference),
            kl_weight=settings.beta,
        )
        if distillation is None or teacher is None:
            return TrainingPass(learner.pack(part, student_view), gradient)
        return _with_distillation(learner, part, minibatch, gradient, distillation, teacher, None if is_whole else old)

    results = run_minibatches(learner, planned, make_pass)
    if not results.steps:
        return UpdateResult({})
    count = sum(values["is_clipped"].numel() for _, values in results.parts)
    clipped, count = learner.total(results.sum_of("is_clipped"), count)
    return UpdateResult(results.metrics() | {"ratio_clipped_share": clipped / count}, token_numbers(results))


def _with_distillation(
    learner: Learner,
    part: list[Example],
    minibatch: Minibatch,
    gradient: Objective,
    distillation: Distillation,
    teacher: Teacher,
    old: Mapping[int, Tensor] | None,
) -> TrainingPass:
    """Combine GRPO's loss on a part with the M-step's loss on those of its turns that have a teacher."""
    taught = with_teacher(part)
    # All processes make a teacher's separate pass, even if this one has no rollout for it.
    states = None if teacher.reuses_keys(learner) else teacher.read(learner, taught)
    batch, conditioned = pack_both(learner, part, taught, teacher)
    where = tokens_with_teacher(part)
    distil = distilling(
        learner, taught, distillation.settings, minibatch.taught, states, _of_taught(part, old, where), where
    )
    terms = [(distillation.reward_weight, gradient), *([(distillation.weight, distil)] if taught else [])]
    return TrainingPass(batch, WeightedSum(terms), conditioned)


def _of_taught(
    part: Sequence[Example], values: Mapping[int, Tensor] | None, where: Tensor
) -> Mapping[int, Tensor] | None:
    """Cut the numbers of rollouts' tokens [T] down to the tokens of turns with a teacher, by rollout index."""
    if values is None or not part:
        return values
    taught = with_teacher(part)
    lengths = [len(example.completion) for example in taught]
    return by_rollout(taught, _of_tokens(part, values)[where].split(lengths))


def _of_tokens(part: Sequence[Example], values: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([values[example.rollout] for example in part]) if part else torch.zeros(0)


def _teacher_log_probs(learner: Learner, part: Sequence[Example]) -> Tensor:
    """Read log q of each completion token of a part [S]; nan where the turn has no teacher."""
    taught = with_teacher(part)
    scored = learner.score(learner.pack(taught, teacher_view), TokenLogProbs(learner.temperature)).values
    values = torch.full((sum(len(example.completion) for example in part),), torch.nan)
    if taught:
        values[tokens_with_teacher(part)] = scored["log_probs"].float().cpu()
    return values
