"""Divides rollouts into micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

from vpd.packing.trie import PrefixCounter, Tokens


def plan_micro_batches(
    views: Sequence[Sequence[Tokens | None]],
    max_tokens: int,
    *,
    groups: Sequence[Hashable] | None = None,
    share_prefixes: bool = True,
) -> list[list[int]]:
    """Indices of rollouts for each micro-batch, in the given order.

    A micro-batch holds, for each view, at most ``max_tokens`` packed tokens: the distinct prefix tokens of the view's
    sequences without their last ones (as :func:`pack` computes them). It is filled until the next rollout no longer
    fits; with ``groups``, a group that fits in a micro-batch of its own is not divided, so that its prefix is computed
    once. A group above the budget is divided, each part with its own prefix. A rollout that alone is above the budget
    gets a micro-batch of its own.

    Args:
        views: for each rollout its sequences, for example the student's and the teacher's; None where it lacks one.
        max_tokens: the budget of one view.
        groups: for each rollout the name of its group; rollouts of a group stand next to each other.
        share_prefixes: whether the batches will share prefixes; False counts every token.

    Raises:
        ValueError: the budget is not positive, or rollouts have different numbers of views.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a micro-batch needs a budget of at least 1 token.")
    view_count = len(views[0]) if views else 0
    if any(len(rollout) != view_count for rollout in views):
        raise ValueError("Every rollout must have the same number of views; write None where it lacks one.")
    names = range(len(views)) if groups is None else groups
    runs = [
        [i for i, _ in run] for _, run in groupby(zip(range(len(views)), names, strict=True), key=lambda pair: pair[1])
    ]

    plan: list[list[int]] = []
    current = _MicroBatch(view_count, max_tokens, share_prefixes)
    for run in runs:
        whole = _MicroBatch(view_count, max_tokens, share_prefixes)
        # Only if the run overflows what is open and fits in an empty one does a boundary before it spare a prefix.
        if current.rollouts and not current.copy().extend(run, views) and whole.extend(run, views):
            plan.append(current.rollouts)
            current = whole
            continue
        for i in run:
            if current.rollouts and not current.fits(views[i]):
                plan.append(current.rollouts)
                current = _MicroBatch(view_count, max_tokens, share_prefixes)
            current.add(i, views[i])
    return [*plan, current.rollouts] if current.rollouts else plan


class _MicroBatch:
    """The rollouts of one micro-batch and the packed tokens of each of their views."""

    def __init__(self, view_count: int, max_tokens: int, share_prefixes: bool) -> None:
        self.rollouts: list[int] = []
        self._max_tokens = max_tokens
        self._counters = [PrefixCounter(share_prefixes=share_prefixes) for _ in range(view_count)]

    def copy(self) -> _MicroBatch:
        duplicate = _MicroBatch(0, self._max_tokens, True)
        duplicate.rollouts = list(self.rollouts)
        duplicate._counters = [counter.copy() for counter in self._counters]
        return duplicate

    def fits(self, rollout: Sequence[Tokens | None]) -> bool:
        return all(
            counter.count + (0 if sequence is None else counter.new_tokens(sequence[:-1])) <= self._max_tokens
            for counter, sequence in zip(self._counters, rollout, strict=True)
        )

    def add(self, index: int, rollout: Sequence[Tokens | None]) -> None:
        for counter, sequence in zip(self._counters, rollout, strict=True):
            if sequence is not None:
                counter.add(sequence[:-1])
        self.rollouts.append(index)

    def extend(self, indices: list[int], views: Sequence[Sequence[Tokens | None]]) -> bool:
        """Add the rollouts up to the first that does not fit; whether all did."""
        for i in indices:
            if not self.fits(views[i]):
                return False
            self.add(i, views[i])
        return True
