"""The E-step: refine the teacher on outcomes (VPD, arXiv 2605.15113, Algorithm 1, lines 9 to 14).

    r~(x,y,C) = beta * [ log q(y|x,C) - log pi_prior(y|x) ]
    L_E = - mean_{successes} log sigmoid( r~ - delta ) - mean_{failures} log sigmoid( -(r~ - delta) )
    delta = 1/2 ( mean r~ over successes + mean r~ over failures )

The prior is the student at the start of this E-step, by the trainer's own forward. It and delta are computed once and
stay as they are while the minibatches are worked through. A batch of one class has no E-step: delta would be undefined,
and a loss that only pushes up or down teaches no difference.

delta needs the implicit rewards of the whole batch before the loss of its first rollout. Where the batch is one pass,
that pass's own forward gives them, and the prior is read within it, behind the questions' keys and values, as the
network is still the student there; otherwise passes without gradient go before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vpd.algorithms.example import Example, minibatches, student_view, teacher_view
from vpd.config import VPD
from vpd.losses import implicit_rewards
from vpd.packing import PackedBatch
from vpd.policy.adapter import training_the_teacher_only
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner
from vpd.policy.objectives import Objective, Refine


@dataclass(frozen=True)
class Margin:
    """Means of the implicit reward over one set of rollouts, all processes.

    Attributes:
        success, failure: mean r~ of each class; nan where the class is empty.
        success_count, failure_count: their sizes.
    """

    success: float
    failure: float
    success_count: int
    failure_count: int

    @property
    def margin(self) -> float:
        return self.success - self.failure

    @property
    def reward_shift(self) -> float:
        return 0.5 * (self.success + self.failure)


def measure_margin(learner: Learner, implicit_rewards: Tensor, is_success: Tensor) -> Margin:
    """Mean implicit reward [B] of successes and failures, over all processes."""
    rewards = implicit_rewards.double()
    success_sum, failure_sum, success_count, failure_count = learner.total(
        float(rewards[is_success].sum()),
        float(rewards[~is_success].sum()),
        int(is_success.sum()),
        int((~is_success).sum()),
    )
    return Margin(
        success_sum / success_count if success_count else math.nan,
        failure_sum / failure_count if failure_count else math.nan,
        int(success_count),
        int(failure_count),
    )


def holds_both_classes(learner: Learner, examples: Sequence[Example]) -> bool:
    """Whether the batch, over all processes, has a success and a failure: an E-step needs both."""
    successes = sum(example.is_success for example in examples)
    return all(learner.total(successes, len(examples) - successes))


def refine_teacher(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPD,
    batch_prompts: int,
    fresh: Sequence[Example] | None = None,
    memory: dict[str, float] | None = None,
    measures_after: bool = True,
) -> Refinement:
    """Run one E-step on the active rollouts of a batch, which must hold both classes.

    Args:
        learner: the policy.
        examples: this process's active rollouts.
        settings: beta, minibatch and learning-rate factor.
        batch_prompts: prompts of the batch over all processes.
        fresh: held-out rollouts on which to measure the margin before and after; None (on every process) leaves it out.
        memory: where the shift is kept from one E-step to the next, for ``shift_momentum``.
        measures_after: measure the batch's margin after the step in a pass of its own. The M-step's teacher pass gives
            the same numbers where it reads the refined teacher: :meth:`Refinement.margins_after`.

    Returns:
        Metrics among others. Margins are those of the batch and of ``fresh``, before and after, of all rollouts and of
        those with each source of feedback; NaN where a class is absent.
    """

    def prior_of_student(of: Sequence[Example]) -> Tensor:
        weights = learner.copies[INITIAL] if settings.prior == "fixed" else None
        return learner.sequence_log_probs(of, student_view, weights)

    def rewards_of(of: Sequence[Example], prior: Tensor) -> Tensor:
        return implicit_rewards(learner.sequence_log_probs(of, teacher_view), prior, betas(of, settings))

    is_success = _successes(examples)
    margins: dict[str, float | None] = {}
    if fresh is not None:
        fresh_prior = prior_of_student(fresh)
        margins |= _margins_by_source(learner, "margin_fresh_before", fresh, rewards_of(fresh, fresh_prior))
    planned = [
        learner.micro_batches(minibatch, teacher_view)
        for minibatch in minibatches(examples, settings.e_minibatch_prompts, batch_prompts)
        if learner.total(len(minibatch))[0]
    ]
    start = _Start(learner, is_success, settings.shift_momentum, memory)
    prior = _Prior(learner)
    is_one = _is_one_pass(learner, planned)
    if not (is_one and settings.prior == "dynamic" and learner.lends_keys):
        prior.note(examples, prior_of_student(examples))
    if not is_one:
        start.take(rewards_of(examples, prior.of(examples)))

    make_pass = _refining_pass(learner, settings, prior, start)
    has_own = learner.module.has_teacher_adapter
    with training_the_teacher_only(learner.module) if has_own else nullcontext():
        steps = [
            learner.optimise(parts, make_pass, factor=settings.e_learning_rate_factor)
            for parts in planned * settings.e_epochs
        ]

    rewards = start.rewards
    assert rewards is not None
    margins |= _margins_by_source(learner, "margin_before", examples, rewards)
    refinement = Refinement(learner, examples, prior.of(examples), settings)
    if measures_after:
        margins |= refinement.margins_after(learner.sequence_log_probs(examples, teacher_view))
    if fresh is not None:
        margins |= _margins_by_source(learner, "margin_fresh_after", fresh, rewards_of(fresh, fresh_prior))
    refinement.metrics = (
        {
            "e_step": 1.0,
            "e_loss": sum(step.loss for step in steps),
            "e_grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "e_clipped_share": sum(step.clipped for step in steps) / len(steps),
            "reward_shift": start.shift,
        }
        | margins
        | _gradient_weights(learner, rewards - start.shift, is_success)
        | _length_effects(learner, examples, rewards - start.shift, is_success)
    )
    return refinement


@dataclass
class Refinement:
    """What an E-step did.

    Attributes:
        prior: [B], log pi_prior(y|x) of the active rollouts.
        metrics: its numbers.
    """

    learner: Learner
    examples: Sequence[Example]
    prior: Tensor
    settings: VPD
    metrics: dict[str, float | None] = field(default_factory=dict)

    def margins_after(self, teacher_log_probs: Tensor) -> dict[str, float | None]:
        """The batch's margins after the step.

        Args:
            teacher_log_probs: [B], log q(y|x,C) of the refined teacher.
        """
        rewards = implicit_rewards(teacher_log_probs, self.prior, betas(self.examples, self.settings))
        return _margins_by_source(self.learner, "margin_after", self.examples, rewards)


@dataclass
class _Start:
    """The implicit rewards at the E-step's start and delta, which follows from them; a constant of the step."""

    learner: Learner
    is_success: Tensor
    momentum: float
    memory: dict[str, float] | None
    rewards: Tensor | None = None
    shift: float = math.nan
    counts: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        successes = int(self.is_success.sum())
        totals = self.learner.total(successes, len(self.is_success) - successes)
        self.counts = (int(totals[0]), int(totals[1]))

    def take(self, rewards: Tensor) -> None:
        """Note the rewards [B] of all of this process's rollouts, in their order."""
        self.rewards = rewards
        self.shift = measure_margin(self.learner, rewards, self.is_success).reward_shift
        if self.memory is not None:
            self.shift += self.momentum * (self.memory.get("reward_shift", self.shift) - self.shift)
            self.memory["reward_shift"] = self.shift

    def shift_from(self, rewards: Tensor) -> float:
        """delta, found from the rewards of a pass over the whole batch where it is not known yet."""
        if self.rewards is None:
            self.take(rewards.detach().float().cpu())
        return self.shift


@dataclass
class _Prior:
    """log pi_prior(y|x) of rollouts, by their index: read before the step, or within the first pass of it."""

    learner: Learner
    log_probs: dict[int, Tensor] = field(default_factory=dict)

    def note(self, examples: Sequence[Example], log_probs: Tensor) -> None:
        """Keep what was found of some rollouts [B]."""
        self.log_probs |= {example.rollout: value for example, value in zip(examples, log_probs, strict=True)}

    def of(self, examples: Sequence[Example]) -> Tensor:
        """That of some rollouts, which are known: [B]."""
        return torch.stack([self.log_probs[example.rollout] for example in examples]) if examples else torch.zeros(0)

    def read_within(self, examples: Sequence[Example], teacher: PackedBatch) -> Tensor:
        """Read it within the teacher's pass, before anything is updated: [B]."""
        self.note(examples, self.learner.sequence_log_probs_behind(examples, student_view, teacher))
        return self.of(examples)


def _is_one_pass(learner: Learner, planned: Sequence[Sequence[Sequence[Example]]]) -> bool:
    """Whether every process works its whole batch off in one pass, in which all of them can sum, free of dropout."""
    one = len(planned) == 1 and len(planned[0]) == 1 and len(planned[0][0]) > 0 and not learner.module.has_dropout
    return learner.total(one)[0] == learner.accelerator.num_processes


def betas(examples: Sequence[Example], settings: VPD) -> Tensor:
    """The implicit reward's temperature for each rollout [B]: one for all, unless a reference length is set."""
    lengths = torch.tensor([float(len(example.completion)) for example in examples])
    if settings.length_reference is None:
        return torch.full_like(lengths, settings.bco_beta)
    return settings.bco_beta * settings.length_reference / lengths


def _successes(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.is_success for example in examples], dtype=torch.bool)


def _margins_by_source(
    learner: Learner, name: str, examples: Sequence[Example], rewards: Tensor
) -> dict[str, float | None]:
    """The margin of implicit rewards [B] under ``name``, and under ``name_source`` that of each source alone.

    A margin that grows for one source only may be read off its template: the texts for successes and failures differ.
    """
    is_success = _successes(examples)
    margins: dict[str, float | None] = {name: measure_margin(learner, rewards, is_success).margin}
    for source in learner.union(example.source for example in examples if example.source):
        chosen = torch.tensor([example.source == source for example in examples], dtype=torch.bool)
        margins[f"{name}_{source}"] = measure_margin(learner, rewards[chosen], is_success[chosen]).margin
    return margins


def _refining_pass(
    learner: Learner, settings: VPD, prior: _Prior, start: _Start
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    success_count, failure_count = start.counts

    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        is_known = all(example.rollout in prior.log_probs for example in part)
        batch = learner.pack(part, teacher_view, lends=not is_known)
        return batch, Refine(
            prior_log_probs=prior.of(part) if is_known else partial(prior.read_within, part, batch),
            is_success=torch.tensor([example.is_success for example in part], dtype=torch.bool),
            shift_from=start.shift_from,
            success_count=success_count,
            failure_count=failure_count,
            betas=betas(part, settings),
            temperature=learner.temperature,
        )

    return make_pass


def _gradient_weights(learner: Learner, shifted_rewards: Tensor, is_success: Tensor) -> dict[str, float | None]:
    """Mean weight of each class's gradient at the start, between 0 and 1: a stale shift turns one of them off."""
    weights = torch.where(is_success, -shifted_rewards, shifted_rewards).sigmoid()
    measured = measure_margin(learner, weights, is_success)
    return {"e_weight_success": measured.success, "e_weight_failure": measured.failure}


def _length_effects(
    learner: Learner, examples: Sequence[Example], shifted_rewards: Tensor, is_success: Tensor
) -> dict[str, float | None]:
    """How length weighs in the implicit rewards that the E-step starts from, which are sums over tokens.

    ``misranked_share`` are rollouts on the wrong side of the shift, whose gradient grows with length;
    ``saturated_share`` those so far on the right side (sigmoid above 0.95) that they have next to none.
    """
    side = torch.where(is_success, shifted_rewards, -shifted_rewards)
    rewards = shifted_rewards.double()
    lengths = torch.tensor([len(example.completion) for example in examples], dtype=torch.float64)
    columns = (side < 0, side.sigmoid() > 0.95, rewards, lengths, rewards * lengths, rewards**2, lengths**2)
    count, *sums = learner.total(len(examples), *(float(column.sum()) for column in columns))
    misranked, saturated, reward, length, product, reward_square, length_square = (value / count for value in sums)
    variances = (reward_square - reward**2) * (length_square - length**2)
    return {
        "misranked_share": misranked,
        "saturated_share": saturated,
        "reward_length_correlation": (product - reward * length) / math.sqrt(variances) if variances > 1e-12 else None,
    }
