"""The M-step and the policy gradient share this loop over minibatches, with one optimizer step for each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpd.algorithms.example import Example, student_view, with_teacher
from vpd.policy.learner import Learner, OptimizerStep, TrainingPass, View


@dataclass(frozen=True)
class Counts:
    """The sizes that losses are divided by, over all processes.

    Attributes:
        tokens: How many completion tokens there are.
        sequences: How many rollouts there are.
    """

    tokens: float
    sequences: float


@dataclass(frozen=True)
class Minibatch:
    """This process's share of the rollouts of one optimizer step.

    Attributes:
        parts: The rollouts in micro-batches; every process has the same number of them.
        counts: The sizes over all rollouts of the minibatch.
        taught: The sizes over those rollouts that have a teacher, reduced to their turns with one.
    """

    parts: list[list[Example]]
    counts: Counts
    taught: Counts


MakePass = Callable[[list[Example], Minibatch], TrainingPass]
"""Packs a micro-batch, which may be empty, and says what to compute of it."""


@dataclass
class MinibatchResults:
    """The results of the loop.

    Attributes:
        steps: The optimizer steps that were made.
        parts: Every micro-batch of this process that holds rollouts, with the numbers that its objective gave.
    """

    steps: list[OptimizerStep]
    parts: list[tuple[list[Example], dict[str, Tensor]]]

    def metrics(self) -> dict[str, float | None]:
        """The mean loss and gradient norm of the steps, and the share of them whose gradient was clipped."""
        count = len(self.steps)
        return {
            "m_loss": sum(step.loss for step in self.steps) / count,
            "grad_norm": sum(step.grad_norm for step in self.steps) / count,
            "clipped_share": sum(step.clipped for step in self.steps) / count,
        }

    def sum_of(self, name: str) -> float:
        """The sum of one of the objective's numbers over this process's tokens."""
        return sum(float(values[name].sum()) for _, values in self.parts if name in values)


def split_by_prompts(examples: Sequence[Example], prompts: int | None, batch_prompts: int) -> list[list[Example]]:
    """Cut a batch into minibatches of ``prompts`` prompts with all their rollouts.

    The cut follows the group's index over all processes, so that every process gets the same number of minibatches. A
    minibatch is empty on a process that has no active rollout in it.

    Args:
        examples: The rollouts of this process.
        prompts: How many a minibatch has; None for one minibatch.
        batch_prompts: How many the whole batch has, over all processes.
    """
    size = prompts or batch_prompts
    return [
        [example for example in examples if start <= example.group < start + size]
        for start in range(0, batch_prompts, size)
    ]


def plan_minibatches(
    learner: Learner,
    examples: Sequence[Example],
    prompts: int | None,
    batch_prompts: int,
    *,
    scored: View[Example] | None = None,
    conditioned: bool = False,
    wants_layers: bool = False,
) -> list[Minibatch]:
    """Plan the minibatches that hold any rollout on any process, and divide them into micro-batches.

    Args:
        learner: The policy.
        examples: The rollouts of this process.
        prompts: How many a minibatch has; None for one minibatch.
        batch_prompts: How many the whole batch has, over all processes.
        scored, conditioned, wants_layers: The arguments of :meth:`Learner.micro_batches`.
    """
    planned = []
    for minibatch in split_by_prompts(examples, prompts, batch_prompts):
        taught = with_teacher(minibatch)
        sizes = [(sum(len(e.completion) for e in part), len(part)) for part in (minibatch, taught)]
        tokens, sequences, taught_tokens, taught_sequences = learner.total(*sizes[0], *sizes[1])
        if not tokens:
            continue
        parts = learner.micro_batches(
            minibatch, student_view, scored, conditioned=conditioned, wants_layers=wants_layers
        )
        # A minibatch without any teacher has no distillation to divide.
        taught_counts = Counts(max(taught_tokens, 1.0), max(taught_sequences, 1.0))
        planned.append(Minibatch(parts, Counts(tokens, sequences), taught_counts))
    return planned


def run_minibatches(learner: Learner, minibatches: Sequence[Minibatch], make_pass: MakePass) -> MinibatchResults:
    """Make one optimizer step for each minibatch."""
    results = MinibatchResults([], [])
    for minibatch in minibatches:

        def pass_of(part: list[Example], minibatch: Minibatch = minibatch) -> TrainingPass:
            return make_pass(part, minibatch)

        step = learner.optimise(minibatch.parts, pass_of)
        results.steps.append(step)
        results.parts += [(part, values) for part, values in zip(minibatch.parts, step.values, strict=True) if part]
    return results


def token_weights(part: Sequence[Example], aggregation: str, counts: Counts) -> Tensor:
    """Compute the loss's weight of each completion token of ``part``, in order [S].

    ``token_mean`` gives a token 1 / (the minibatch's tokens), ``sequence_mean`` gives it
    1 / (the minibatch's rollouts * the rollout's tokens), and ``sum`` gives it 1.
    """
    weights = {
        "token_mean": lambda length: 1.0 / counts.tokens,
        "sequence_mean": lambda length: 1.0 / (counts.sequences * length),
        "sum": lambda length: 1.0,
    }[aggregation]
    return torch.tensor(
        [weights(len(example.completion)) for example in part for _ in example.completion], dtype=torch.float32
    )


def tokens_with_teacher(part: Sequence[Example]) -> Tensor:
    """Return the indices of those completion tokens of a part that belong to a turn with a teacher, in order."""
    flags = [turn.teacher_prompt is not None for example in part for turn in example.turns for _ in turn.completion]
    return torch.tensor(flags, dtype=torch.bool).nonzero()[:, 0]


def by_rollout(examples: Sequence[Example], values: Sequence[Tensor]) -> dict[int, Tensor]:
    """Key the numbers of each rollout's tokens by the rollout's index."""
    return {example.rollout: value for example, value in zip(examples, values, strict=True)}
