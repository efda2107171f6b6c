"""What to compute from a packed batch's hidden states, inside the policy module's forward.

Each objective is called with the hidden states [T, H] of the packed tokens, the model's head and the batch, and
returns :class:`Outputs`. Scored tokens (S of them) that share a packed row are computed once, since completions of a
group often begin alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vpd.losses import DivergenceKind, Head, bco_loss, divergence, implicit_rewards, token_log_probs
from vpd.packing import PackedBatch


@dataclass(slots=True)
class Outputs:
    """Result of an objective: a scalar ``loss`` where there is one, and detached numbers by name."""

    loss: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs: ...


def _distinct(*columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The distinct rows of integer columns [S], and for each entry the index of its row among them."""
    code = columns[0]
    for column in columns[1:]:
        code = code * (int(column.max()) + 1 if column.numel() else 1) + column
    _, inverse, counts = torch.unique(code, return_inverse=True, return_counts=True)
    # A stable sort puts the first entry of each distinct row at the start of its run.
    first = torch.argsort(inverse, stable=True)[torch.cumsum(counts, 0) - counts]
    return [column[first] for column in columns], inverse


def _log_probs(hidden: Tensor, head: Head, batch: PackedBatch, temperature: float) -> Tensor:
    """Log-probability [S] of every completion token."""
    (rows, targets), inverse = _distinct(batch.predictor, batch.targets)
    return token_log_probs(hidden.index_select(0, rows), head, targets, temperature=temperature)[inverse]


def _per_sequence(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sum token values [S] within each sequence: [B]."""
    return values.new_zeros(batch.sequence_count).index_add(0, batch.sequence, values)


@dataclass(frozen=True)
class SequenceLogProbs:
    """``values["log_probs"]`` [B]: log-probability of each completion, summed over its tokens."""

    temperature: float

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs:
        log_probs = _log_probs(hidden, head, batch, self.temperature)
        return Outputs(values={"log_probs": _per_sequence(log_probs, batch)})


@dataclass(frozen=True)
class PredictorStates:
    """The hidden states that predict completion tokens: ``values["hidden"]`` [U, H], distinct ones only, and
    ``values["rows"]`` [S], which of them predicts each completion token."""

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs:
        (rows,), inverse = _distinct(batch.predictor)
        return Outputs(values={"hidden": hidden.index_select(0, rows), "rows": inverse})


@dataclass(frozen=True)
class Imitate:
    """Negative log-likelihood of the completions, each token divided by ``token_count``, the minibatch's number."""

    token_count: int

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs:
        return Outputs(loss=-_log_probs(hidden, head, batch, temperature=1.0).sum() / self.token_count)


@dataclass(frozen=True)
class Refine:
    """The E-step's loss: BCO on the implicit rewards of teacher sequences (VPD, Algorithm 1).

    Attributes:
        prior_log_probs: [B], log pi_prior(y|x), without gradient.
        is_success: [B] bool.
        reward_shift: delta, a constant of the E-step.
        success_count, failure_count: over the whole E-batch, all processes.
    """

    prior_log_probs: Tensor
    is_success: Tensor
    reward_shift: float
    success_count: int
    failure_count: int
    bco_beta: float
    temperature: float

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs:
        log_probs = _per_sequence(_log_probs(hidden, head, batch, self.temperature), batch)
        loss = bco_loss(
            implicit_rewards(log_probs, self.prior_log_probs.to(log_probs.device), self.bco_beta),
            self.is_success.to(log_probs.device),
            self.reward_shift,
            success_count=self.success_count,
            failure_count=self.failure_count,
        )
        return Outputs(loss=loss)


@dataclass(frozen=True)
class Distil:
    """The M-step's loss: divergence between student and stop-gradient teacher at every completion token.

    Attributes:
        teacher_hidden, teacher_rows: what :class:`PredictorStates` gave for the same completions behind the teacher's
            prompts.
        token_weights: [S], the loss's weight of each completion token.
    """

    teacher_hidden: Tensor
    teacher_rows: Tensor
    token_weights: Tensor
    kind: DivergenceKind
    alpha: float
    temperature: float

    def __call__(self, hidden: Tensor, head: Head, batch: PackedBatch) -> Outputs:
        (rows, teacher_rows, targets), inverse = _distinct(batch.predictor, self.teacher_rows, batch.targets)
        weights = self.token_weights.to(hidden.device)
        result = divergence(
            hidden.index_select(0, rows),
            self.teacher_hidden.index_select(0, teacher_rows),
            head,
            token_weights=weights.new_zeros(rows.numel()).index_add(0, inverse, weights),
            kind=self.kind,
            alpha=self.alpha,
            temperature=self.temperature,
            targets=targets,
        )
        values = {
            "divergence": result.per_token,
            "entropy": result.entropy,
            "student_log_probs": result.student_log_probs,
            "teacher_log_probs": result.teacher_log_probs,
        }
        return Outputs(loss=result.total, values={name: value[inverse] for name, value in values.items()})
