"""The environment for data with a ``prompt`` column, judged by reward functions with TRL's signature."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config import ConfigError
from vpd.environments.base import Environment, Split
from vpd.environments.reward_functions import RewardCall, RewardFunction, Score, ready
from vpd.environments.rows import Row, chat_prompt, load_rows, rows_of
from vpd.environments.splits import check_split, cut_splits, question_key
from vpd.types import Messages, Task, Verdict

Rows: TypeAlias = Iterable[Mapping[str, Any]]

NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})


class PromptDataset(Environment):
    """Prompts, and functions that reward completions, in the form that TRL's trainers take.

    A prompt is a text (shown as one user message; the functions see plain texts) or chat messages (the functions see
    messages). The other columns go to the functions. Rewards are summed with their weights; a function that returns
    None has no part in the sum, and where all return None the rollout is ungraded. Functions may return ``(reward,
    feedback)`` pairs; the feedback texts are joined.

    ``final`` is all of ``eval_dataset`` (or of the data's test split) where there is one; otherwise it is taken from
    the training prompts, as ``selection`` always is. Rows with the same prompt count once.

    Args:
        train_dataset: A ``datasets.Dataset``, a list of rows, a JSONL file or a Hugging Face dataset id.
        reward_funcs: One or several functions, plain or async, or their names as ``package.module:function``.
            None gives the completions no judge.
        eval_dataset: The held-out rows, in the same forms.
        reward_weights: One number for each function; by default all weights are 1.
        selection_size: How many training prompts become the selection split; by default a tenth, at most 100.
        final_size: How many training prompts become the final split where no rows are held out; by default a tenth, at
            most 300.
        seed: Decides the split.

    Raises:
        ConfigError: The data or a function cannot be used as it is; the message says which and why.
    """

    # Reward functions for TRL may limit their time by an alarm, as math-verify's does, and only the main thread
    # receives alarms.
    judges_on_main_thread = True

    def __init__(
        self,
        train_dataset: Rows | str | Path,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None,
        *,
        eval_dataset: Rows | str | Path | None = None,
        reward_weights: Sequence[float] | None = None,
        selection_size: int | None = None,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        train, test = _load(train_dataset, eval_dataset)
        tenth = max(1, len(train) // 10)
        selection_size = min(100, tenth) if selection_size is None else selection_size
        final_size = min(300, tenth) if final_size is None else final_size
        self._tasks = cut_splits(
            [_task(row) for row in train],
            None if test is None else [_task(row) for row in test],
            key=lambda task: _prompt_key(task.data["prompt"]),
            selection_size=selection_size,
            final_size=final_size if test is None else None,
            seed=seed,
            origin=str(train_dataset) if isinstance(train_dataset, str | Path) else "train_dataset",
        )
        tasks = [task for split in self._tasks.values() for task in split]
        columns = frozenset.intersection(*(frozenset(task.data["columns"]) for task in tasks))
        self.judges = reward_funcs is not None
        self._calls = [] if reward_funcs is None else _reward_calls(reward_funcs, reward_weights, columns)

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def judge(self, task: Task, completion: str) -> Verdict | Awaitable[Verdict]:
        details: dict[str, Any] = {}
        arguments = _arguments(task, completion, details)
        if any(call.is_async for call in self._calls):
            return self._judge_async(arguments, details)
        return self._verdict([call.read(call(arguments)) for call in self._calls], details)

    async def _judge_async(self, arguments: dict[str, Any], details: dict[str, Any]) -> Verdict:
        # Plain functions are called first: an error in one must not leave an async call that nobody awaits.
        calls = sorted(self._calls, key=lambda call: call.is_async)
        results = [call(arguments) for call in calls]
        finished = dict(zip(calls, await asyncio.gather(*map(ready, results)), strict=True))
        return self._verdict([call.read(finished[call]) for call in self._calls], details)

    def _verdict(self, scores: list[Score], details: dict[str, Any]) -> Verdict:
        rewards = [call.weight * s.reward for call, s in zip(self._calls, scores, strict=True) if s.reward is not None]
        if not rewards:
            raise ValueError(
                f"All reward functions ({', '.join(call.name for call in self._calls)}) returned None for a completion."
            )
        by_function = {call.name: score.reward for call, score in zip(self._calls, scores, strict=True)}
        feedback = "\n".join(score.feedback for score in scores if score.feedback)
        return Verdict(math.fsum(rewards), feedback or None, {**details, "rewards": by_function})


def _load(
    train_dataset: Rows | str | Path, eval_dataset: Rows | str | Path | None
) -> tuple[list[Row], list[Row] | None]:
    train, test = _rows(train_dataset, "train")
    if eval_dataset is not None:
        test, _ = _rows(eval_dataset, "eval")
    if not train or test == []:
        raise ConfigError(f"The {'evaluation' if train else 'training'} data has no rows.")
    return train, test


def _rows(dataset: Rows | str | Path, name: str) -> tuple[list[Row], list[Row] | None]:
    if not isinstance(dataset, str | Path):
        return rows_of(dataset, name), None
    splits = load_rows(dataset)
    rows = [Row(row.id.replace("train", name, 1), row.origin, row.values) for row in splits["train"]]
    return rows, splits.get("test")


def _task(row: Row) -> Task:
    messages = chat_prompt(row)
    columns = {name: value for name, value in row.values.items() if name not in NOT_COLUMNS}
    return Task(row.id, messages, {"prompt": row.values["prompt"], "columns": columns})


def _prompt_key(prompt: str | Messages) -> str:
    return question_key(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False))


def _reward_calls(
    functions: RewardFunction | str | Sequence[RewardFunction | str],
    weights: Sequence[float] | None,
    columns: frozenset[str],
) -> list[RewardCall]:
    listed = list(functions) if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]
    if not listed:
        raise ConfigError("data.reward_funcs is empty: at least one function must reward the completions.")
    if weights is not None and len(weights) != len(listed):
        raise ConfigError(
            f"data.reward_weights has {len(weights)} numbers for {len(listed)} reward functions; give one for each."
        )
    calls = [
        RewardCall(function, weight, columns)
        for function, weight in zip(listed, weights or [1.0] * len(listed), strict=True)
    ]
    names = [call.name for call in calls]
    for index, call in enumerate(calls):
        if names.count(call.name) > 1:
            call.name = f"{call.name}_{index}"
    return calls


def _arguments(task: Task, completion: str, details: dict[str, Any]) -> dict[str, Any]:
    """Make TRL's keyword arguments for one completion; ``details`` receives whatever the functions log."""
    prompt = task.data["prompt"]
    chat = not isinstance(prompt, str)

    def log_extra(column: str, values: list[Any]) -> None:
        details[column] = values[0]

    return {
        **{name: [value] for name, value in task.data["columns"].items()},
        "prompts": [prompt],
        "completions": [[{"role": "assistant", "content": completion}] if chat else completion],
        "log_extra": log_extra,
        "log_metric": details.__setitem__,
    }
