"""What GRPO and its mixtures with a teacher share: advantages within groups, and the policy-gradient update.

All graded rollouts take part; the teacher enters only where a rollout has feedback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vpd.algorithms.example import Example, minibatches, student_view, teacher_view, with_teacher
from vpd.algorithms.m_step import MStepResult, distilling_objective, split_by_rollout, token_weights
from vpd.algorithms.teacher import borrows
from vpd.config import MStepSettings, PolicyGradientSettings
from vpd.packing import PackedBatch
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner
from vpd.policy.objectives import Objective, Outputs, PolicyGradient, TokenLogProbs, WeightedSum

Shape = Callable[[Tensor, Tensor], Tensor]
"""From advantages [S] and the teacher's lead log q - log pi [S] (0 where there is no teacher) to advantages [S]."""

Distillation = tuple[float, float, MStepSettings]
"""The weight of GRPO's loss, that of the M-step's, and the M-step's settings."""


def group_advantages(examples: Sequence[Example], scale_rewards: bool) -> dict[int, Tensor]:
    """The reward's distance from its group's mean at each completion token [T], by rollout index.

    With ``scale_rewards`` divided by the group's standard deviation, plus 1e-4 as TRL has it.
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
    examples: Sequence[Example],
    settings: PolicyGradientSettings,
    batch_prompts: int,
    advantages: Mapping[int, Tensor],
    *,
    shape: Shape | None = None,
    distillation: Distillation | None = None,
) -> MStepResult:
    """One optimizer step a minibatch on GRPO's objective.

    Args:
        learner: the policy.
        examples: this process's graded rollouts.
        settings: aggregation, minibatch and clipping.
        batch_prompts: prompts of the batch over all processes.
        advantages: of each completion token [T], by rollout index.
        shape: how the teacher changes them; None reads no teacher.
        distillation: adds the M-step's loss.
    """
    old = _by_rollout(examples, learner.token_log_probs(examples, student_view))
    reference = (
        _by_rollout(examples, learner.token_log_probs(examples, student_view, learner.copies[INITIAL]))
        if settings.beta
        else None
    )
    result, steps, clipped_tokens, tokens = MStepResult({}), [], 0.0, 0
    minibatch_prompts = settings.m_minibatch_prompts
    is_whole = minibatch_prompts is None or minibatch_prompts >= batch_prompts
    reads_teacher = shape is not None or distillation is not None
    wants_layers = distillation is not None and distillation[2].representation_weight > 0
    is_behind = shape is None and distillation is not None and borrows(learner, distillation[2])
    for minibatch in minibatches(examples, settings.m_minibatch_prompts, batch_prompts):
        counts = _counts(learner, minibatch)
        if not counts[0]:
            continue

        def keep_numbers(part: list[Example], outputs: Outputs) -> None:
            nonlocal clipped_tokens, tokens
            clipped_tokens += float(outputs.values["is_clipped"].sum())
            tokens += outputs.values["is_clipped"].numel()
            if "divergence" in outputs.values:
                result.tokens.update(split_by_rollout(with_teacher(part), outputs))

        make_pass = _gradient_pass(learner, settings, counts, advantages, old, reference, shape, distillation, is_whole)
        scored = teacher_view if reads_teacher else None
        parts = learner.micro_batches(minibatch, student_view, scored, behind=is_behind, wants_layers=wants_layers)
        steps.append(learner.optimise(parts, make_pass, keep_numbers))
    if steps:
        clipped, count = learner.total(clipped_tokens, tokens)
        result.metrics = {
            "m_loss": sum(step.loss for step in steps) / len(steps),
            "grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "clipped_share": sum(step.clipped for step in steps) / len(steps),
            "ratio_clipped_share": clipped / count,
        }
    return result


def _gradient_pass(
    learner: Learner,
    settings: PolicyGradientSettings,
    counts: Sequence[float],
    advantages: Mapping[int, Tensor],
    old: Mapping[int, Tensor],
    reference: Mapping[int, Tensor] | None,
    shape: Shape | None,
    distillation: Distillation | None,
    is_whole: bool,
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    tokens, sequences, taught_tokens, taught_sequences = counts

    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        gradient = PolicyGradient(
            advantages=_of_tokens(part, advantages),
            old_log_probs=_of_tokens(part, old),
            token_weights=token_weights(part, settings.loss_aggregation, tokens, sequences),
            temperature=learner.temperature,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            shape=shape,
            teacher_log_probs=None if shape is None else _teacher_log_probs(learner, part),
            reference_log_probs=None if reference is None else _of_tokens(part, reference),
            kl_weight=settings.beta,
        )
        objective: Objective = gradient
        taught = with_teacher(part)
        lends = distillation is not None and bool(taught) and borrows(learner, distillation[2])
        batch = learner.pack(part, student_view, lends=lends)
        if distillation is not None:
            reward_weight, weight, m_step = distillation
            where = _tokens_with_teacher(part)
            # With one update a batch the student is the one that wrote the rollouts.
            weighs = None if is_whole else old
            # Also where this process has none: a teacher's pass of its own is one that all processes make.
            distil = distilling_objective(
                learner, taught, batch, m_step, taught_tokens, taught_sequences, weighs, where
            )
            objective = WeightedSum([(reward_weight, gradient), *([(weight, distil)] if taught else [])])
        return batch, objective

    return make_pass


def _by_rollout(examples: Sequence[Example], values: Sequence[Tensor]) -> dict[int, Tensor]:
    return {example.rollout: value for example, value in zip(examples, values, strict=True)}


def _counts(learner: Learner, minibatch: Sequence[Example]) -> list[float]:
    """Tokens and sequences of all rollouts and of those with a teacher, over all processes."""
    taught = with_teacher(minibatch)
    sizes = [(sum(len(example.completion) for example in part), len(part)) for part in (minibatch, taught)]
    # A minibatch without any teacher has no distillation to divide.
    tokens, sequences, taught_tokens, taught_sequences = learner.total(*sizes[0], *sizes[1])
    return [tokens, sequences, max(taught_tokens, 1.0), max(taught_sequences, 1.0)]


def _of_tokens(part: Sequence[Example], values: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([values[example.rollout] for example in part]) if part else torch.zeros(0)


def _tokens_with_teacher(part: Sequence[Example]) -> Tensor:
    """Which of a part's completion tokens, in order, belong to rollouts with a teacher."""
    flags = [example.has_teacher for example in part for _ in example.completion]
    return torch.tensor(flags, dtype=torch.bool).nonzero()[:, 0]


def _teacher_log_probs(learner: Learner, part: Sequence[Example]) -> Tensor:
    """log q of each completion token of a part [S]; nan where the rollout has no teacher."""
    taught = with_teacher(part)
    scored = learner.score(learner.pack(taught, teacher_view), TokenLogProbs(learner.temperature)).values
    values = torch.full((sum(len(example.completion) for example in part),), torch.nan)
    if taught:
        values[_tokens_with_teacher(part)] = scored["log_probs"].float().cpu()
    return values
