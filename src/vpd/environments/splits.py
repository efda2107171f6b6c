"""Functions that cut questions into splits that never overlap.

Two questions are the same when their texts are equal up to white space; ids, seeds and other columns do not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from vpd.config import ConfigError
from vpd.environments.base import SPLITS, Split
from vpd.types import Task

Item = TypeVar("Item")


def question_key(text: str) -> str:
    """Return the text in the form in which it is compared: each run of white space becomes one blank."""
    return " ".join(text.split())


def without_duplicates(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """Keep the first item of each key, in order."""
    kept: dict[Hashable, Item] = {}
    for item in items:
        kept.setdefault(key(item), item)
    return list(kept.values())


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Return a copy in an order that depends on the seed and the number of items alone."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def check_sizes(**sizes: int) -> None:
    """Raise ConfigError for a negative size."""
    for name, size in sizes.items():
        if size < 0:
            raise ConfigError(f"data.{name} = {size} must not be negative.")


def cut_splits(
    train: Sequence[Task],
    test: Sequence[Task] | None,
    *,
    key: Callable[[Task], Hashable],
    selection_size: int,
    final_size: int | None,
    seed: int,
    origin: str,
) -> dict[Split, list[Task]]:
    """Cut distinct questions into three splits.

    Where there is a ``test``, ``final`` is made of it (at most ``final_size`` questions), and a training question that
    also stands in ``test`` is dropped from training: the published test set stays whole. Otherwise ``final`` is taken
    from the training questions, as ``selection`` always is; the rest is ``train``.

    Args:
        train: The tasks to train on and to take held-out ones from.
        test: The published test tasks, or None where there are none.
        key: Gives a task's identity; of several tasks with one key the first is kept.
        selection_size: How many tasks of ``train`` become ``selection``.
        final_size: How many tasks ``final`` has at most; None takes all of ``test``.
        seed: Decides which tasks go where.
        origin: Names the data in error messages.

    Raises:
        ConfigError: Nothing says where ``final`` comes from, or too few questions are left to train on.
    """
    if test is None and final_size is None:
        raise ConfigError(f"{origin} has no test split: set data.final_size to take the final questions from training.")
    check_sizes(selection_size=selection_size, final_size=final_size or 0)
    pool = without_duplicates(train, key)
    if test is None:
        final = []
    else:
        test = without_duplicates(test, key)
        held_out = {key(task) for task in test}
        pool = [task for task in pool if key(task) not in held_out]
        final = test if final_size is None or final_size >= len(test) else shuffled(test, seed)[:final_size]
    taken_final = final_size or 0 if test is None else 0
    taken = taken_final + selection_size
    if len(pool) <= taken:
        raise ConfigError(
            f"{origin} has {len(pool)} distinct training questions, but data.selection_size = {selection_size}"
            + (f" and data.final_size = {taken_final}" if taken_final else "")
            + " are taken from them and some must be left to train on: lower these sizes or bring more questions."
        )
    pool = shuffled(pool, seed)
    return {
        "train": pool[taken:],
        "selection": pool[taken_final:taken],
        "final": pool[:taken_final] if test is None else final,
    }


def check_split(tasks: dict[Split, list[Task]], split: Split) -> list[Task]:
    """Return the tasks of a split; raise ValueError with a sentence where there is no split of that name."""
    if split not in tasks:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    return tasks[split]
