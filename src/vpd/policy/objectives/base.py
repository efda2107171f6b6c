"""What an objective is given and gives, and what all objectives need.

Scored tokens (S of them) that share a packed row are computed once, since completions of a group often begin alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vpd.losses import Head, token_log_probs
from vpd.packing import PackedBatch


@dataclass(slots=True)
class Outputs:
    """The result of an objective.

    Attributes:
        loss: A scalar, where the objective has one.
        values: Detached numbers by name.
    """

    loss: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredStates:
    """The hidden states that predict the completion tokens of some rollouts, before the head.

    Attributes:
        hidden: [U, H'], the distinct ones.
        rows: [S], the index among them that predicts each completion token.
        head: The head that maps them to logits; None for the policy's own.
    """

    hidden: Tensor
    rows: Tensor
    head: Head | None = None


@dataclass(frozen=True)
class Forward:
    """What the passes of one forward gave.

    Attributes:
        hidden: [T, H'], the hidden states of the batch's packed tokens.
        head: The policy's head.
        batch: What was run.
        conditioned: The states of the pass without gradient that was conditioned on the batch's keys and values; None
            where there was none, or where it held no tokens.
        chunk_size: How many tokens' logits may exist at a time.
    """

    hidden: Tensor
    head: Head
    batch: PackedBatch
    conditioned: ScoredStates | None
    chunk_size: int


class Objective(ABC):
    """What to compute from a forward.

    Attributes:
        layers: The layers whose outputs stand beside the last hidden states, counted from 1; None for all.
    """

    layers: Sequence[int] | None = ()

    @abstractmethod
    def __call__(self, forward: Forward) -> Outputs: ...


def scored_states(hidden: Tensor, batch: PackedBatch) -> ScoredStates:
    """Pick the states that predict the batch's completion tokens from all of its hidden states [T, H']."""
    (rows,), inverse = distinct_rows(batch.predictor)
    return ScoredStates(hidden.index_select(0, rows), inverse)


def distinct_rows(*columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """The distinct rows of integer columns [S], and for each entry the index of its row among them."""
    code = columns[0]
    for column in columns[1:]:
        code = code * (int(column.max()) + 1 if column.numel() else 1) + column
    _, inverse, counts = torch.unique(code, return_inverse=True, return_counts=True)
    # A stable sort puts the first entry of each distinct row at the start of its run.
    first = torch.argsort(inverse, stable=True)[torch.cumsum(counts, 0) - counts]
    return [column[first] for column in columns], inverse


def log_probs_of(
    hidden: Tensor, rows: Tensor, head: Head, targets: Tensor, temperature: float, chunk_size: int
) -> Tensor:
    """The log-probability [S] of each target [S], which ``hidden[rows]`` [S, H] predicts."""
    (own_rows, own_targets), inverse = distinct_rows(rows, targets)
    states = hidden.index_select(0, own_rows)
    return token_log_probs(states, head, own_targets, temperature=temperature, chunk_size=chunk_size)[inverse]


def batch_log_probs(forward: Forward, temperature: float) -> Tensor:
    """The log-probability [S] of every completion token of the batch."""
    batch = forward.batch
    return log_probs_of(forward.hidden, batch.predictor, forward.head, batch.targets, temperature, forward.chunk_size)


def sum_by_rollout(values: Tensor, batch: PackedBatch) -> Tensor:
    """Token values [S] summed over each rollout's completion tokens, those of all its turns: [B]."""
    return values.new_zeros(batch.rollout_count).index_add(0, batch.rollout, values)
