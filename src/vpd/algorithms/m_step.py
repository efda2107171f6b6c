"""The M-step: distil the teacher's token distribution into the student on its own rollouts.

    L_M = E sum_t D( pi(.|x,y_<t), stopgrad q(.|x,C,y_<t) )

The teacher is the live network behind the feedback prompt: it is read anew at every minibatch, without gradient, and
where the network allows it (:attr:`Learner.lends_keys`) behind the questions' keys and values of the student's pass. By
default no importance weights correct for the E-step in between (VPD, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from vpd.algorithms.example import Example, minibatches, student_view, teacher_view
from vpd.algorithms.teacher import borrows, kept_head, read_teacher, read_teacher_behind
from vpd.config import MStepSettings
from vpd.packing import PackedBatch
from vpd.policy.architecture import head_of
from vpd.policy.learner import Learner
from vpd.policy.objectives import Distil, Objective, Outputs, TeacherStates


@dataclass
class TokenNumbers:
    """Per completion token of one rollout [T]: what the M-step saw before its update."""

    student_log_probs: list[float]
    teacher_log_probs: list[float]
    divergence: list[float]


@dataclass
class MStepResult:
    """Metrics of the M-step, and the numbers of every token by rollout index."""

    metrics: dict[str, float | None]
    tokens: dict[int, TokenNumbers] = field(default_factory=dict)


def old_log_probs(
    learner: Learner, examples: Sequence[Example], settings: MStepSettings, batch_prompts: int, *, e_step: bool = False
) -> Mapping[int, Tensor] | None:
    """log pi(y_t) [T] by rollout index, before any update; None where the M-step's loss will not ask for it.

    Args:
        learner: the policy.
        examples: this process's active rollouts.
        settings: which divergence, and whether tokens are weighed.
        batch_prompts: prompts of the batch over all processes.
        e_step: whether an E-step comes between.
    """
    minibatch = settings.m_minibatch_prompts
    is_changed = e_step or (minibatch is not None and minibatch < batch_prompts)
    if not (settings.weighs_tokens and is_changed):
        return None
    found = learner.token_log_probs(examples, student_view)
    return {example.rollout: values for example, values in zip(examples, found, strict=True)}


def distil(
    learner: Learner,
    examples: Sequence[Example],
    settings: MStepSettings,
    batch_prompts: int,
    betas: Tensor,
    old: Mapping[int, Tensor] | None = None,
) -> MStepResult:
    """Run the M-step on the active rollouts of a batch, one optimizer step a minibatch.

    Args:
        learner: the policy.
        examples: this process's active rollouts: those with a teacher.
        settings: divergence, aggregation and minibatch.
        batch_prompts: prompts of the batch over all processes.
        betas: [B], temperature of each rollout's implicit reward, for the reported margin.
        old: from :func:`old_log_probs`, called before the E-step.
    """
    result = MStepResult({})
    steps = []
    entropy_sum = representation_sum = 0.0
    is_behind = borrows(learner, settings)
    wants_layers = settings.representation_weight > 0
    planned = [
        (
            minibatch,
            learner.micro_batches(minibatch, student_view, teacher_view, behind=is_behind, wants_layers=wants_layers),
        )
        for minibatch in minibatches(examples, settings.m_minibatch_prompts, batch_prompts)
    ]
    kept = _frozen_states(learner, [part for _, parts in planned for part in parts], settings)
    for minibatch, parts in planned:
        token_count, sequence_count = learner.total(sum(len(e.completion) for e in minibatch), len(minibatch))
        if not token_count:
            continue

        def keep_numbers(part: list[Example], outputs: Outputs) -> None:
            nonlocal entropy_sum, representation_sum
            entropy_sum += float(outputs.values["entropy"].sum())
            if "representation" in outputs.values:
                representation_sum += float(outputs.values["representation"].sum())
            result.tokens.update(split_by_rollout(part, outputs))

        make_pass = _distilling_pass(learner, settings, token_count, sequence_count, old, kept)
        steps.append(learner.optimise(parts, make_pass, keep_numbers))
    if steps:
        result.metrics = _metrics(learner, examples, result.tokens, entropy_sum, betas) | {
            "m_loss": sum(step.loss for step in steps) / len(steps),
            "grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "clipped_share": sum(step.clipped for step in steps) / len(steps),
        }
        if settings.representation_weight:
            distance, count = learner.total(representation_sum, sum(len(e.completion) for e in examples))
            result.metrics["representation"] = distance / count
    return result


def _distilling_pass(
    learner: Learner,
    settings: MStepSettings,
    token_count: float,
    sequence_count: float,
    old: Mapping[int, Tensor] | None,
    kept: Mapping[int, TeacherStates],
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        batch = learner.pack(part, student_view, lends=borrows(learner, settings))
        objective = distilling_objective(
            learner, part, batch, settings, token_count, sequence_count, old, states=kept.get(id(part))
        )
        return batch, objective

    return make_pass


def _frozen_states(
    learner: Learner, parts: Sequence[list[Example]], settings: MStepSettings
) -> dict[int, TeacherStates]:
    """For a frozen teacher: what it predicts for every part before the first update, by the part's identity."""
    if settings.teacher != "frozen":
        return {}
    head = kept_head(head_of(learner.module.model))
    return {id(part): replace(read_teacher(learner, part, settings), head=head) for part in parts}


def distilling_objective(
    learner: Learner,
    taught: list[Example],
    student: PackedBatch,
    settings: MStepSettings,
    token_count: float,
    sequence_count: float,
    old: Mapping[int, Tensor] | None = None,
    tokens: Tensor | None = None,
    states: TeacherStates | None = None,
) -> Distil:
    """The M-step's loss on some rollouts with a teacher.

    The teacher is read at once, or within the student's pass where it can take its keys and values.

    Args:
        learner: the policy.
        taught: the rollouts; none of them on a process that has none left.
        student: the batch of the student's pass, packed with ``lends`` if the teacher :func:`borrows`.
        settings: the divergence.
        token_count, sequence_count: over all such rollouts of the minibatch, all processes.
        old: from :func:`old_log_probs`.
        tokens: which of the student batch's completion tokens are theirs; None where it holds no others.
        states: what the teacher predicts, where it was read before.
    """
    teacher: TeacherStates | Callable[[], TeacherStates]
    if states is None and borrows(learner, settings):
        teacher = partial(read_teacher_behind, learner, taught, settings, student)
    else:
        teacher = states or read_teacher(learner, taught, settings)
    return Distil(
        teacher=teacher,
        token_weights=token_weights(taught, settings.loss_aggregation, token_count, sequence_count),
        settings=settings,
        temperature=learner.temperature,
        tokens=tokens,
        old_log_probs=torch.cat([old[example.rollout] for example in taught]) if old and taught else None,
    )


def token_weights(part: Sequence[Example], aggregation: str, token_count: float, sequence_count: float) -> Tensor:
    """The loss's weight of each completion token of ``part``, in order: [S].

    ``token_mean`` is one over the minibatch's active tokens, ``sequence_mean`` one over its sequences and the
    sequence's own length, ``sum`` is one.
    """
    weights = {
        "token_mean": lambda length: 1.0 / token_count,
        "sequence_mean": lambda length: 1.0 / (sequence_count * length),
        "sum": lambda length: 1.0,
    }[aggregation]
    return torch.tensor(
        [weights(len(example.completion)) for example in part for _ in example.completion], dtype=torch.float32
    )


def split_by_rollout(part: Sequence[Example], outputs: Outputs) -> dict[int, TokenNumbers]:
    """The values of a :class:`Distil` pass over ``part``, by rollout index."""
    lengths = [len(example.completion) for example in part]
    columns = [
        outputs.values[name].float().cpu().split(lengths)
        for name in ("student_log_probs", "teacher_log_probs", "divergence")
    ]
    return {
        example.rollout: TokenNumbers(*(column[index].tolist() for column in columns))
        for index, example in enumerate(part)
    }


def _metrics(
    learner: Learner,
    examples: Sequence[Example],
    tokens: dict[int, TokenNumbers],
    entropy_sum: float,
    betas: Tensor,
) -> dict[str, float | None]:
    """Token means over all processes, and the margin of the teacher against the student as it is now."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    divergence_sum = first_sum = token_count = 0.0
    for example, beta in zip(examples, betas.tolist(), strict=True):
        numbers = tokens[example.rollout]
        implicit_reward = beta * (sum(numbers.teacher_log_probs) - sum(numbers.student_log_probs))
        sums[example.is_success][0] += implicit_reward
        sums[example.is_success][1] += 1
        divergence_sum += sum(numbers.divergence)
        first_sum += numbers.divergence[0]
        token_count += len(numbers.divergence)
    success, successes, failure, failures, divergence, first, entropy, count = learner.total(
        *sums[True], *sums[False], divergence_sum, first_sum, entropy_sum, token_count
    )
    margin = success / successes - failure / failures if successes and failures else math.nan
    return {
        "divergence": divergence / count,
        "divergence_first": first / (successes + failures),
        "entropy": entropy / count,
        "margin": margin,
    }
