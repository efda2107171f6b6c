"""The E-step refines the teacher on outcomes (VPD, arXiv 2605.15113, Algorithm 1, lines 9 to 14).

    r~(x,y,C) = beta * [ log q(y|x,C) - log pi_prior(y|x) ]
    L_E = - mean_{successes} log sigmoid( r~ - delta ) - mean_{failures} log sigmoid( -(r~ - delta) )
    delta = 1/2 ( mean r~ over successes + mean r~ over failures )

The prior is the student at the start of this E-step, computed by the trainer's own forward. The prior and delta are
computed once and stay as they are while the E-step goes through the minibatches. A batch of one class has no E-step:
delta would be undefined, and a loss that only pushes up or only pushes down teaches no difference.

delta needs the implicit rewards of the whole batch before the loss of its first rollout. Where the batch fits in one
pass, that pass gives them: the student's pass is conditioned on the teacher's keys and values, since both are the same
network as long as nothing has been updated, and delta is computed after the two passes and before the loss. Otherwise
passes without gradient come first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpd.algorithms.example import Example, student_view, teacher_view
from vpd.algorithms.minibatches import split_by_prompts
from vpd.losses import implicit_rewards, measure_margin
from vpd.policy.adapter import training_the_teacher_only
from vpd.policy.copies import INITIAL
from vpd.policy.learner import Learner, OptimizerStep, TrainingPass
from vpd.policy.objectives import Refine, ShiftRule

if TYPE_CHECKING:
    from vpd.algorithms.vpd import VPDSettings


@dataclass
class Refinement:
    """The result of an E-step.

    Attributes:
        learner: The policy.
        examples: The active rollouts of this process.
        prior: The log-probability log pi_prior(y|x) of each of these rollouts [B].
        settings: The algorithm's settings.
        metrics: The metrics of the step.
    """

    learner: Learner
    examples: Sequence[Example]
    prior: Tensor
    settings: VPDSettings
    metrics: dict[str, float | None] = field(default_factory=dict)

    def margins_after(self, teacher_log_probs: Tensor) -> dict[str, float | None]:
        """Measure the batch's margins after the step.

        Args:
            teacher_log_probs: The log-probability log q(y|x,C) of each rollout under the refined teacher [B].
        """
        rewards = implicit_rewards(teacher_log_probs, self.prior, betas(self.examples, self.settings))
        return _margins_by_source(self.learner, "margin_after", self.examples, rewards)


@dataclass(frozen=True)
class _Start:
    """The constants of an E-step.

    Attributes:
        prior: The log-probability log pi_prior(y|x) of each rollout [B].
        rewards: The implicit rewards before the first update [B].
        shift: The shift delta.
    """

    prior: Tensor
    rewards: Tensor
    shift: float


def holds_both_classes(learner: Learner, examples: Sequence[Example]) -> bool:
    """Tell whether the batch, over all processes, has a success and a failure. An E-step needs both."""
    successes = sum(example.is_success for example in examples)
    return all(learner.total(successes, len(examples) - successes))


def refine_teacher(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPDSettings,
    batch_prompts: int,
    fresh: Sequence[Example] | None = None,
    memory: dict[str, float] | None = None,
    measures_after: bool = True,
) -> Refinement:
    """Run one E-step on the active rollouts of a batch, which must hold both classes.

    Args:
        learner: The policy.
        examples: The active rollouts of this process.
        settings: The settings of beta, the minibatch and the learning-rate factor.
        batch_prompts: The prompts of the batch, over all processes.
        fresh: Held-out rollouts on which the margin is measured before and after; None, on every process, leaves it
            out.
        memory: The numbers that outlast an E-step: it keeps delta for ``shift_momentum``.
        measures_after: Whether a pass of its own measures the batch's margin after the step. The M-step's teacher pass
            gives the same numbers where it reads the refined teacher: :meth:`Refinement.margins_after`.

    Returns:
        The refinement with its metrics. Among them are the margins of the batch and of ``fresh``, before and after the
        step, over all rollouts and over those with each source of feedback; nan where a class is absent.
    """
    margins: dict[str, float | None] = {}
    fresh_prior = None if fresh is None else _prior(learner, fresh, settings)
    if fresh is not None and fresh_prior is not None:
        margins |= _margins_by_source(
            learner, "margin_fresh_before", fresh, _rewards(learner, fresh, fresh_prior, settings)
        )
    has_own = learner.module.has_teacher_adapter
    with training_the_teacher_only(learner.module) if has_own else nullcontext():
        start, steps = _take_steps(learner, examples, settings, batch_prompts, memory or {})
    if memory is not None:
        memory["reward_shift"] = start.shift

    margins |= _margins_by_source(learner, "margin_before", examples, start.rewards)
    refinement = Refinement(learner, examples, start.prior, settings)
    if measures_after:
        margins |= refinement.margins_after(learner.sequence_log_probs(examples, teacher_view))
    if fresh is not None and fresh_prior is not None:
        margins |= _margins_by_source(
            learner, "margin_fresh_after", fresh, _rewards(learner, fresh, fresh_prior, settings)
        )
    is_success = _successes(examples)
    refinement.metrics = (
        {
            "e_step": 1.0,
            "e_loss": sum(step.loss for step in steps),
            "e_grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "e_clipped_share": sum(step.clipped for step in steps) / len(steps),
            "reward_shift": start.shift,
        }
        | margins
        | _gradient_weights(learner, start.rewards - start.shift, is_success)
        | _length_effects(learner, examples, start.rewards - start.shift, is_success)
    )
    return refinement


def _take_steps(
    learner: Learner,
    examples: Sequence[Example],
    settings: VPDSettings,
    batch_prompts: int,
    memory: dict[str, float],
) -> tuple[_Start, list[OptimizerStep]]:
    """Make the optimizer steps of an E-step, and return them with its constants."""
    planned = [
        learner.micro_batches(minibatch, teacher_view)
        for minibatch in split_by_prompts(examples, settings.e_minibatch_prompts, batch_prompts)
        if learner.total(len(minibatch))[0]
    ]
    steps: list[OptimizerStep] = []
    rule = ShiftRule(learner.total, settings.shift_momentum, memory.get("reward_shift"))
    work = [parts for _ in range(settings.e_epochs) for parts in planned]
    refine = _Refining(learner, examples, settings)
    if _is_one_pass(learner, planned):
        within = settings.prior == "dynamic" and learner.reuses_keys
        prior = None if within else _prior(learner, examples, settings)
        first = refine.step(work.pop(0), prior, rule)
        (found,) = first.values
        start = _Start(found["prior"].cpu(), found["rewards"].cpu(), float(found["shift"]))
        steps.append(first)
    else:
        prior = _prior(learner, examples, settings)
        rewards = _rewards(learner, examples, prior, settings)
        start = _Start(prior, rewards, rule(rewards, _successes(examples)))
    steps += [refine.step(parts, start.prior, start.shift) for parts in work]
    return start, steps


class _Refining:
    """Makes the E-step's optimizer steps.

    Args:
        learner: The policy.
        examples: The active rollouts of this process.
        settings: The algorithm's settings.
    """

    def __init__(self, learner: Learner, examples: Sequence[Example], settings: VPDSettings) -> None:
        self._learner = learner
        self._settings = settings
        self._places = {example.rollout: place for place, example in enumerate(examples)}
        successes = sum(example.is_success for example in examples)
        self._counts = learner.total(successes, len(examples) - successes)

    def step(self, parts: Sequence[list[Example]], prior: Tensor | None, shift: float | ShiftRule) -> OptimizerStep:
        """Make one optimizer step on the micro-batches of a minibatch.

        Args:
            parts: The micro-batches of this process.
            prior: The prior of all of this process's rollouts [B]; None computes it in the same forward.
            shift: The shift delta, or the rule that computes it in the same forward.
        """

        def make_pass(part: list[Example]) -> TrainingPass:
            return self._pass(part, prior, shift)

        # A rule takes the rollouts of its pass together, which halves would not have.
        divisible = not isinstance(shift, ShiftRule)
        return self._learner.optimise(parts, make_pass, self._settings.e_learning_rate_factor, divisible)

    def _pass(self, part: list[Example], prior: Tensor | None, shift: float | ShiftRule) -> TrainingPass:
        learner = self._learner
        batch = learner.pack(part, teacher_view, keeps_keys=prior is None)
        objective = Refine(
            prior_log_probs=None if prior is None else prior[[self._places[example.rollout] for example in part]],
            is_success=_successes(part),
            shift=shift,
            success_count=int(self._counts[0]),
            failure_count=int(self._counts[1]),
            betas=betas(part, self._settings),
            temperature=learner.temperature,
        )
        if prior is not None:
            return TrainingPass(batch, objective)
        return TrainingPass(batch, objective, learner.pack(part, student_view, conditioned_on=batch))


def _is_one_pass(learner: Learner, planned: Sequence[Sequence[Sequence[Example]]]) -> bool:
    """Tell whether every process has exactly one pass, in which all of them can sum, and there is no dropout."""
    one = len(planned) == 1 and len(planned[0]) == 1 and len(planned[0][0]) > 0 and not learner.module.has_dropout
    return learner.total(one)[0] == learner.accelerator.num_processes


def _prior(learner: Learner, examples: Sequence[Example], settings: VPDSettings) -> Tensor:
    """Compute log pi_prior(y|x) [B] in separate passes without gradient."""
    network = learner.copies[INITIAL].module if settings.prior == "fixed" else None
    return learner.sequence_log_probs(examples, student_view, network)


def _rewards(learner: Learner, examples: Sequence[Example], prior: Tensor, settings: VPDSettings) -> Tensor:
    """Compute the implicit rewards [B] of the teacher as it is, in passes without gradient."""
    return implicit_rewards(learner.sequence_log_probs(examples, teacher_view), prior, betas(examples, settings))


def betas(examples: Sequence[Example], settings: VPDSettings) -> Tensor:
    """Return the implicit reward's temperature for each rollout [B]: one for all, unless a reference length is set."""
    lengths = torch.tensor([float(len(example.completion)) for example in examples])
    if settings.length_reference is None:
        return torch.full_like(lengths, settings.bco_beta)
    return settings.bco_beta * settings.length_reference / lengths


def _successes(examples: Sequence[Example]) -> Tensor:
    return torch.tensor([example.is_success for example in examples], dtype=torch.bool)


def _margins_by_source(
    learner: Learner, name: str, examples: Sequence[Example], rewards: Tensor
) -> dict[str, float | None]:
    """Measure the margin of implicit rewards [B] as ``name``, and that of each source alone as ``name_source``.

    A margin that grows for one source only may be read off its template: the texts for successes and failures differ.
    """
    is_success = _successes(examples)
    margins: dict[str, float | None] = {name: measure_margin(learner.total, rewards, is_success).margin}
    for source in learner.union(example.source for example in examples if example.source):
        chosen = torch.tensor([example.source == source for example in examples], dtype=torch.bool)
        margins[f"{name}_{source}"] = measure_margin(learner.total, rewards[chosen], is_success[chosen]).margin
    return margins


def _gradient_weights(learner: Learner, shifted_rewards: Tensor, is_success: Tensor) -> dict[str, float | None]:
    """Average the weight of each class's gradient at the start, in [0, 1]: a stale shift turns one of them off."""
    weights = torch.where(is_success, -shifted_rewards, shifted_rewards).sigmoid()
    measured = measure_margin(learner.total, weights, is_success)
    return {"e_weight_success": measured.success, "e_weight_failure": measured.failure}


def _length_effects(
    learner: Learner, examples: Sequence[Example], shifted_rewards: Tensor, is_success: Tensor
) -> dict[str, float | None]:
    """Measure how length weighs in the implicit rewards that the E-step starts from, which are sums over tokens.

    ``misranked_share`` counts rollouts on the wrong side of the shift, whose gradient grows with length.
    ``saturated_share`` counts those so far on the right side (sigmoid above 0.95) that they have almost no gradient.
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
