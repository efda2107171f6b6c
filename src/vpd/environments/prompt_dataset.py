"""The environment for data with a ``prompt`` column, judged by reward functions with TRL's signature."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vpd.config import ConfigError
from vpd.environments.base import Attempt, Environment, Judgements, Split
from vpd.environments.reward_functions import Logged, RewardCall, RewardFunction, Score, ready
from vpd.environments.rows import Row, chat_prompt, load_rows, rows_of
from vpd.environments.splits import check_split, cut_splits, question_key, without_duplicates
from vpd.types import Demonstration, Messages, Task, Verdict, plain_text

Rows: TypeAlias = Iterable[Mapping[str, Any]]

NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})


class PromptDataset(Environment):
    """Prompts, and functions that reward completions, in the form that TRL's trainers take.

    A prompt is a text or chat messages. As in TRL, a text is continued as it stands, without a chat template, and the
    functions see texts; for chat messages they see messages. Each function is called once for a whole batch. The other
    columns go to the functions; a column that a row lacks is None there. Rewards are summed with their weights; a
    function that returns None has no part in the sum, and where all return None the rollout is ungraded. Functions may
    return ``(reward, feedback)`` pairs; the feedback texts are joined.

    ``selection``, on which a run is evaluated while it trains, is all of ``eval_dataset`` where there is one, and
    ``final`` is all of the data's test split. Each is otherwise taken from the training prompts. Rows with the same
    prompt count once; a training prompt that is held out leaves training. Where rows have a column ``demonstration``, a
    right answer, a warm start can learn from it.

    Args:
        train_dataset: A ``datasets.Dataset``, a list of rows, a JSONL file or a Hugging Face dataset id.
        reward_funcs: One or several functions, plain or async, or their names as ``package.module:function``.
            None gives the completions no judge.
        eval_dataset: The rows of the selection split, in the same forms.
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
    judges_batches = True

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
        train, test, held_out = _load(train_dataset, eval_dataset)
        tenth = max(1, len(train) // 10)
        if held_out is None:
            selection_size = min(100, tenth) if selection_size is None else selection_size
        elif selection_size is not None:
            raise ConfigError("data.selection_size does nothing beside an eval_dataset, which is the selection split.")
        final_size = min(300, tenth) if final_size is None else final_size
        selection = without_duplicates([_task(row) for row in held_out or []], _task_key)
        taken = {_task_key(task) for task in selection}
        rest = [task for task in map(_task, train) if _task_key(task) not in taken]
        if not rest:
            raise ConfigError(
                "All prompts of train_dataset stand in eval_dataset too, so that none is left to train on: leave "
                "eval_dataset out, and a part of train_dataset is held out by itself."
            )
        self._tasks = cut_splits(
            rest,
            None if test is None else [_task(row) for row in test],
            key=_task_key,
            selection_size=selection_size or 0,
            final_size=final_size if test is None else None,
            seed=seed,
            origin=str(train_dataset) if isinstance(train_dataset, str | Path) else "train_dataset",
        )
        if held_out is not None:
            held_out_of_test = {_task_key(task) for task in self._tasks["final"]}
            self._tasks["selection"] = [task for task in selection if _task_key(task) not in held_out_of_test]
        tasks = [task for split in self._tasks.values() for task in split]
        columns = frozenset.intersection(*(frozenset(task.data["columns"]) for task in tasks))
        self.judges = reward_funcs is not None
        self._calls = [] if reward_funcs is None else _reward_calls(reward_funcs, reward_weights, columns)

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return the answers in the column ``demonstration``; rows without one are passed over."""
        told = [(task, task.data["columns"].get("demonstration")) for task in self._tasks["train"]]
        return [Demonstration(task, _answer(task, answer)) for task, answer in told if answer is not None][:count]

    def judge(self, task: Task, completion: str) -> Verdict | Awaitable[Verdict]:
        judgements = self.judge_batch([Attempt(task, completion)])
        return _only_later(judgements) if isinstance(judgements, Awaitable) else _only(judgements)

    def judge_batch(self, attempts: Sequence[Attempt]) -> Judgements | Awaitable[Judgements]:
        logged = Logged(len(attempts))
        arguments = self._arguments(attempts, logged)
        if any(call.is_async for call in self._calls):
            return self._judge_async(arguments, logged)
        return self._judgements([call.read(call(arguments), logged.count) for call in self._calls], logged)

    async def _judge_async(self, arguments: dict[str, Any], logged: Logged) -> Judgements:
        # Plain functions are called first: an error in one must not leave an async call that nobody awaits.
        calls = sorted(self._calls, key=lambda call: call.is_async)
        results = [call(arguments) for call in calls]
        finished = dict(zip(calls, await asyncio.gather(*map(ready, results)), strict=True))
        return self._judgements([call.read(finished[call], logged.count) for call in self._calls], logged)

    def _arguments(self, attempts: Sequence[Attempt], logged: Logged) -> dict[str, Any]:
        """Make TRL's keyword arguments for a batch; ``logged`` receives whatever the functions log."""
        from transformers import TrainerState

        columns = {name: None for attempt in attempts for name in attempt.task.data["columns"]}
        prompts = [attempt.task.data["prompt"] for attempt in attempts]
        return {
            **{name: [attempt.task.data["columns"].get(name) for attempt in attempts] for name in columns},
            "prompts": prompts,
            "completions": [
                attempt.completion
                if isinstance(prompt, str)
                else [{"role": "assistant", "content": attempt.completion}]
                for prompt, attempt in zip(prompts, attempts, strict=True)
            ],
            "completion_ids": [list(attempt.completion_ids) for attempt in attempts],
            "trainer_state": self.trainer_state or TrainerState(),
            "log_extra": logged.extra,
            "log_metric": logged.metric,
        }

    def _judgements(self, scores: list[list[Score]], logged: Logged) -> Judgements:
        return [
            self._verdict(list(of_completion), logged.details(index))
            for index, of_completion in enumerate(zip(*scores, strict=True))
        ]

    def _verdict(self, scores: list[Score], details: dict[str, Any]) -> Verdict | ValueError:
        rewards = [call.weight * s.reward for call, s in zip(self._calls, scores, strict=True) if s.reward is not None]
        if not rewards:
            return ValueError(
                f"All reward functions ({', '.join(call.name for call in self._calls)}) returned None for a completion."
            )
        by_function = {call.name: score.reward for call, score in zip(self._calls, scores, strict=True)}
        feedback = "\n".join(score.feedback for score in scores if score.feedback)
        return Verdict(math.fsum(rewards), feedback or None, {**details, "rewards": by_function})


def _only(judgements: Judgements) -> Verdict:
    (judgement,) = judgements
    if isinstance(judgement, Exception):
        raise judgement
    return judgement


async def _only_later(judgements: Awaitable[Judgements]) -> Verdict:
    return _only(await judgements)


def _load(
    train_dataset: Rows | str | Path, eval_dataset: Rows | str | Path | None
) -> tuple[list[Row], list[Row] | None, list[Row] | None]:
    """Read the rows for training, those of a test split, and those of ``eval_dataset``."""
    train, test = _rows(train_dataset, "train")
    held_out = None if eval_dataset is None else _rows(eval_dataset, "eval")[0]
    if not train or held_out == []:
        raise ConfigError(f"The {'evaluation' if train else 'training'} data has no rows.")
    return train, test, held_out


def _rows(dataset: Rows | str | Path, name: str) -> tuple[list[Row], list[Row] | None]:
    if not isinstance(dataset, str | Path):
        return rows_of(dataset, name), None
    splits = load_rows(dataset)
    rows = [Row(row.id.replace("train", name, 1), row.origin, row.values) for row in splits["train"]]
    return rows, splits.get("test")


def _task(row: Row) -> Task:
    prompt = row.values.get("prompt")
    messages = plain_text(prompt) if isinstance(prompt, str) and prompt.strip() else chat_prompt(row)
    columns = {name: value for name, value in row.values.items() if name not in NOT_COLUMNS}
    return Task(row.id, messages, {"prompt": row.values["prompt"], "columns": columns})


def _answer(task: Task, demonstration: Any) -> str:
    """The text of a demonstration, which may be an assistant's message as in TRL's ``completion``."""
    text = demonstration
    if isinstance(demonstration, list) and len(demonstration) == 1 and isinstance(demonstration[0], Mapping):
        text = demonstration[0].get("content")
    if not isinstance(text, str) or not text:
        raise ConfigError(
            f"The column 'demonstration' of {task.id} must be a text or one assistant's message, got {demonstration!r}."
        )
    return text


def _task_key(task: Task) -> str:
    prompt: str | Messages = task.data["prompt"]
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
