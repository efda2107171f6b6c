"""The M-step distils the teacher's token distribution into the student, on the student's own rollouts.

    L_M = E sum_t D( pi(.|x,y_<t), stopgrad q(.|x,C,y_<t) )

The teacher is the live network, conditioned on the feedback. It is read anew at every minibatch, without gradient.
Where the network allows KV reuse (:attr:`Learner.reuses_keys`), it takes the keys and values of the question from the
student's pass. By default no importance weights correct for the E-step in between (VPD, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vpd.algorithms.base import TokenNumbers, UpdateResult
from vpd.algorithms.example import Example, student_view
from vpd.algorithms.minibatches import (
    Counts,
    Minibatch,
    MinibatchResults,
    by_rollout,
    plan_minibatches,
    run_minibatches,
    token_weights,
)
from vpd.algorithms.teacher import Teacher, kept_head, make_teacher
from vpd.config import MStepSettings
from vpd.packing import PackedBatch
from vpd.policy.architecture import head_of
from vpd.policy.learner import Learner, TrainingPass
from vpd.policy.objectives import Distil, ScoredStates


def reads_old_log_probs(settings: MStepSettings, batch_prompts: int, *, e_step: bool) -> bool:
    """Whether the M-step's loss asks for log pi(y_t) before any update.

    Args:
        settings: The settings that say which divergence is taken and whether tokens are weighed.
        batch_prompts: The prompts of the batch, over all processes.
        e_step: Whether an E-step comes first.
    """
    minibatch = settings.m_minibatch_prompts
    is_changed = e_step or (minibatch is not None and minibatch < batch_prompts)
    return settings.weighs_tokens and is_changed


def old_log_probs(
    learner: Learner, examples: Sequence[Example], settings: MStepSettings, batch_prompts: int, *, e_step: bool = False
) -> Mapping[int, Tensor] | None:
    """Read log pi(y_t) [T] before any update, by rollout index; None where :func:`reads_old_log_probs` says no."""
    if not reads_old_log_probs(settings, batch_prompts, e_step=e_step):
        return None
    return by_rollout(examples, learner.token_log_probs(examples, student_view))


def distil(
    learner: Learner,
    examples: Sequence[Example],
    settings: MStepSettings,
    batch_prompts: int,
    betas: Tensor,
    old: Mapping[int, Tensor] | None = None,
    teacher: Teacher | None = None,
) -> UpdateResult:
    """Run the M-step on the active rollouts of a batch, one optimizer step a minibatch.

    Args:
        learner: The policy.
        examples: The active rollouts of this process: those with a teacher.
        settings: The divergence, the aggregation and the minibatch.
        batch_prompts: The prompts of the batch, over all processes.
        betas: The temperature of each rollout's implicit reward [B], for the reported margin.
        old: The result of :func:`old_log_probs`, called before the E-step.
        teacher: The teacher whose predictions are distilled; by default the one that the settings name.
    """
    chosen = teacher or make_teacher(settings)
    planned = plan_minibatches(
        learner,
        examples,
        settings.m_minibatch_prompts,
        batch_prompts,
        scored=chosen.view,
        conditioned=chosen.reuses_keys(learner),
        wants_layers=settings.representation_weight > 0,
    )
    frozen = _frozen_states(learner, planned, chosen)

    def make_pass(part: list[Example], minibatch: Minibatch) -> TrainingPass:
        # Another network makes its pass before the student's, so that both passes' activations are not kept at once.
        states = _states_before(learner, part, chosen, frozen)
        batch, conditioned = pack_both(learner, part, part, chosen)
        return TrainingPass(batch, distilling(learner, part, settings, minibatch.counts, states, old), conditioned)

    results = run_minibatches(learner, planned, make_pass)
    tokens = token_numbers(results)
    if not results.steps:
        return UpdateResult({}, tokens)
    metrics = _token_metrics(learner, examples, tokens, results.sum_of("entropy"), betas) | results.metrics()
    if settings.representation_weight:
        distance, count = learner.total(
            results.sum_of("representation"), sum(len(example.completion) for example in examples)
        )
        metrics["representation"] = distance / count
    return UpdateResult(metrics, tokens)


def pack_both(
    learner: Learner, part: list[Example], taught: list[Example], teacher: Teacher
) -> tuple[PackedBatch, PackedBatch | None]:
    """Pack the student's batch, and the teacher's batch conditioned on it where there is KV reuse."""
    if not teacher.reuses_keys(learner):
        return learner.pack(part, student_view), None
    batch = learner.pack(part, student_view, keeps_keys=bool(taught))
    # Every process must make the second pass, even if it has no rollout with a teacher left.
    return batch, learner.pack(taught, teacher.view, conditioned_on=batch if taught else None)


def distilling(
    learner: Learner,
    taught: list[Example],
    settings: MStepSettings,
    counts: Counts,
    states: ScoredStates | None,
    old: Mapping[int, Tensor] | None = None,
    tokens: Tensor | None = None,
) -> Distil:
    """Make the objective of the M-step's loss on some rollouts with a teacher.

    Args:
        learner: The policy.
        taught: The rollouts; empty on a process that has none left.
        settings: The settings of the divergence.
        counts: The sizes over all such rollouts of the minibatch.
        states: The teacher's states, where they were read before; None where its pass is conditioned on the student's.
        old: The result of :func:`old_log_probs`.
        tokens: The indices of these rollouts' completion tokens in the student's batch; None where it holds no others.
    """
    return Distil(
        teacher=states,
        token_weights=token_weights(taught, settings.loss_aggregation, counts),
        settings=settings,
        temperature=learner.temperature,
        tokens=tokens,
        old_log_probs=torch.cat([old[example.rollout] for example in taught]) if old and taught else None,
    )


def token_numbers(results: MinibatchResults) -> dict[int, TokenNumbers]:
    """Collect the numbers of every token that was distilled, by rollout index."""
    found: dict[int, TokenNumbers] = {}
    for part, values in results.parts:
        if "divergence" not in values:
            continue
        taught = [(e.rollout, [t for t in e.turns if t.teacher_prompt is not None]) for e in part if e.has_teacher]
        lengths = [sum(len(turn.completion) for turn in turns) for _, turns in taught]
        columns = [
            values[name].float().cpu().split(lengths)
            for name in ("student_log_probs", "teacher_log_probs", "divergence")
        ]
        for index, (rollout, _) in enumerate(taught):
            found[rollout] = TokenNumbers(*(column[index].tolist() for column in columns))
    return found


def _frozen_states(learner: Learner, planned: Sequence[Minibatch], teacher: Teacher) -> dict[int, ScoredStates]:
    """Read a frozen teacher's states for every part before the first update, by the part's identity."""
    if not teacher.is_frozen:
        return {}
    head = kept_head(head_of(learner.module.model))
    parts = [part for minibatch in planned for part in minibatch.parts]
    return {id(part): replace(teacher.read(learner, part), head=head) for part in parts}


def _states_before(
    learner: Learner, part: list[Example], teacher: Teacher, frozen: Mapping[int, ScoredStates]
) -> ScoredStates | None:
    """Read the teacher's states for a part; None where its pass is conditioned on the student's."""
    if id(part) in frozen:
        return frozen[id(part)]
    return None if teacher.reuses_keys(learner) else teacher.read(learner, part)


def _token_metrics(
    learner: Learner,
    examples: Sequence[Example],
    tokens: dict[int, TokenNumbers],
    entropy_sum: float,
    betas: Tensor,
) -> dict[str, float | None]:
    """Compute token means over all processes, and the margin of the teacher against the student as it is now."""
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
