"""The M-step: distil the teacher's token distribution into the student on its own rollouts.

    L_M = E sum_t D( pi(.|x,y_<t), stopgrad q(.|x,C,y_<t) )

The teacher is the live network behind the feedback prompt: it is read anew at every minibatch, in a pass of its own
without gradient. No importance weights correct for the E-step in between (VPD, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpd.algorithms.example import Example, minibatches, student_view, teacher_view
from vpd.config import MStepSettings
from vpd.packing import PackedBatch
from vpd.policy.learner import Learner
from vpd.policy.objectives import Distil, Objective, Outputs, PredictorStates


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


def distil(
    learner: Learner, examples: Sequence[Example], settings: MStepSettings, batch_prompts: int, bco_beta: float
) -> MStepResult:
    """Run the M-step on the active rollouts of a batch, one optimizer step a minibatch.

    Args:
        learner: the policy.
        examples: this process's active rollouts.
        settings: divergence, aggregation and minibatch.
        batch_prompts: prompts of the batch over all processes.
        bco_beta: temperature of the implicit reward, for the reported margin.
    """
    result = MStepResult({})
    steps = []
    entropy_sum = 0.0
    for minibatch in minibatches(examples, settings.m_minibatch_prompts, batch_prompts):
        token_count, sequence_count = learner.total(sum(len(e.completion) for e in minibatch), len(minibatch))
        if not token_count:
            continue

        def keep_numbers(part: list[Example], outputs: Outputs) -> None:
            nonlocal entropy_sum
            entropy_sum += float(outputs.values["entropy"].sum())
            result.tokens.update(_split_by_rollout(part, outputs))

        make_pass = _distilling_pass(learner, settings, token_count, sequence_count)
        parts = learner.micro_batches(minibatch, [student_view, teacher_view])
        steps.append(learner.optimise(parts, make_pass, keep_numbers))
    if steps:
        result.metrics = _metrics(learner, examples, result.tokens, entropy_sum, bco_beta) | {
            "m_loss": sum(step.loss for step in steps) / len(steps),
            "grad_norm": sum(step.grad_norm for step in steps) / len(steps),
            "clipped_share": sum(step.clipped for step in steps) / len(steps),
        }
    return result


def _distilling_pass(
    learner: Learner, settings: MStepSettings, token_count: float, sequence_count: float
) -> Callable[[list[Example]], tuple[PackedBatch, Objective]]:
    def make_pass(part: list[Example]) -> tuple[PackedBatch, Objective]:
        teacher = learner.score(learner.pack(part, teacher_view), PredictorStates()).values
        return learner.pack(part, student_view), Distil(
            teacher_hidden=teacher.get("hidden", torch.zeros(0)),
            teacher_rows=teacher.get("rows", torch.zeros(0, dtype=torch.long)),
            token_weights=token_weights(part, settings.loss_aggregation, token_count, sequence_count),
            kind=settings.divergence,
            alpha=settings.alpha,
            temperature=learner.temperature,
        )

    return make_pass


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


def _split_by_rollout(part: Sequence[Example], outputs: Outputs) -> dict[int, TokenNumbers]:
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
    bco_beta: float,
) -> dict[str, float | None]:
    """Token means over all processes, and the margin of the teacher against the student as it is now."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    divergence_sum = token_count = 0.0
    for example in examples:
        numbers = tokens[example.rollout]
        implicit_reward = bco_beta * (sum(numbers.teacher_log_probs) - sum(numbers.student_log_probs))
        sums[example.is_success][0] += implicit_reward
        sums[example.is_success][1] += 1
        divergence_sum += sum(numbers.divergence)
        token_count += len(numbers.divergence)
    success, successes, failure, failures, divergence, entropy, count = learner.total(
        *sums[True], *sums[False], divergence_sum, entropy_sum, token_count
    )
    margin = success / successes - failure / failures if successes and failures else math.nan
    return {"divergence": divergence / count, "entropy": entropy / count, "margin": margin}
