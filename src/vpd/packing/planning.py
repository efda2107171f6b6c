"""Divides rollouts into micro-batches under a token budget."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

from vpd.packing.trie import PrefixCounter, Tokens


def plan_micro_batches(
    views: Sequence[Sequence[Sequence[Tokens]]],
    max_tokens: int | Sequence[int],
    *,
    groups: Sequence[Hashable] | None = None,
    share_prefixes: bool = True,
    conditioned: bool = False,
) -> list[list[int]]:
    """Return the indices of the rollouts of each micro-batch, in the given order.

    A micro-batch holds at most ``max_tokens`` packed tokens of each view: the distinct prefix tokens of the view's
    sequences without their last ones (as :func:`pack` computes them, except for those that fill a batch up). It is
    filled until the next rollout no longer fits. With ``groups``, a group that fits in a micro-batch of its own is not
    divided, so that its prefix is computed once. A group above the budget is divided, each part with its own prefix. A
    rollout that alone is above the budget gets a micro-batch of its own.

    Args:
        views: For each rollout its views, for example the student's and the teacher's, and for each view the sequences
            of the rollout's turns; an empty list where the rollout lacks the view.
        max_tokens: The budget of every view, or one budget for each view.
        groups: The name of each rollout's group; rollouts of a group stand next to each other.
        share_prefixes: Whether the batches will share prefixes; False counts every token.
        conditioned: Whether the passes of all views but the first are conditioned on its keys and values, so that only
            tokens that it lacks count for them. (Such a pass also recomputes the token that predicts a completion's
            first one, which is not counted.)

    Raises:
        ValueError: A budget is not positive, there is not one for each view, or rollouts differ in their number of
            views.
    """
    view_count = len(views[0]) if views else 0
    budgets = [max_tokens] * max(1, view_count) if isinstance(max_tokens, int) else max_tokens
    if views and len(budgets) != view_count:
        raise ValueError(f"There are {len(budgets)} budgets for {view_count} views.")
    if min(budgets) < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a micro-batch needs a budget of at least 1 token.")
    if any(len(rollout) != view_count for rollout in views):
        raise ValueError("Every rollout must have the same number of views; give an empty list where it lacks one.")
    names = range(len(views)) if groups is None else groups
    runs = [
        [i for i, _ in run] for _, run in groupby(zip(range(len(views)), names, strict=True), key=lambda pair: pair[1])
    ]

    def start() -> _MicroBatch:
        return _MicroBatch(budgets[:view_count], share_prefixes, conditioned)

    plan: list[list[int]] = []
    current = start()
    for run in runs:
        whole = start()
        # A boundary before the run spares a prefix only if the run overflows what is open and fits in an empty one.
        if current.rollouts and not current.copy().extend(run, views) and whole.extend(run, views):
            plan.append(current.rollouts)
            current = whole
            continue
        for i in run:
            if not current.add(i, views[i]) and len(current.rollouts) > 1:
                plan.append(current.rollouts[:-1])
                current = start()
                current.add(i, views[i])
    return [*plan, current.rollouts] if current.rollouts else plan


class _MicroBatch:
    """The rollouts of one micro-batch and the packed tokens of each of their views."""

    def __init__(self, budgets: Sequence[int], share_prefixes: bool, conditioned: bool) -> None:
        self.rollouts: list[int] = []
        self._budgets = budgets
        self._conditioned = conditioned
        # Where views are conditioned on the first one, their counters hold its tokens, too.
        self._counters = [PrefixCounter(share_prefixes=share_prefixes) for _ in budgets]

    def copy(self) -> _MicroBatch:
        duplicate = _MicroBatch(self._budgets, True, self._conditioned)
        duplicate.rollouts = list(self.rollouts)
        duplicate._counters = [counter.copy() for counter in self._counters]
        return duplicate

    def add(self, index: int, rollout: Sequence[Sequence[Tokens]]) -> bool:
        """Put a rollout in, and return whether the whole is still within the budgets."""
        self.rollouts.append(index)
        for number, (counter, sequences) in enumerate(zip(self._counters, rollout, strict=True)):
            first = rollout[0] if self._conditioned and number else []
            for tokens in (*first, *sequences):
                counter.add(tokens[:-1])
        counts = [counter.count for counter in self._counters]
        if self._conditioned:
            counts[1:] = [count - counts[0] for count in counts[1:]]
        return all(count <= budget for count, budget in zip(counts, self._budgets, strict=True))

    def extend(self, indices: list[int], views: Sequence[Sequence[Sequence[Tokens]]]) -> bool:
        """Put rollouts in up to the first that does not fit, and return whether all did."""
        return all(self.add(i, views[i]) for i in indices)
