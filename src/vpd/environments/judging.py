"""Judges many completions, with plain and async judges alike, also where some of them fail or hang."""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import sysconfig
import threading
import traceback
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from vpd.environments.base import Attempt, Environment
from vpd.loop import run
from vpd.types import Task, Verdict

Outcome: TypeAlias = Verdict | Exception
"""A verdict, or the error that the judge itself failed with, which leaves the rollout ungraded."""

_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


def judge_all(
    environment: Environment, attempts: Sequence[Attempt | tuple[Task, str]], seconds: float | None = None
) -> list[Outcome]:
    """Judge each attempt and return the outcomes in order; async judges run concurrently.

    A judge that raises, or whose reward is not a finite number, has failed for that completion alone. A judge of whole
    batches that raises has failed for all of them.

    Args:
        environment: The judge.
        attempts: The completions with their tasks.
        seconds: How long to wait for a judgement; None waits without limit. An async judge of whole batches has this
            long for each completion. Async judges may wait for each other, for
            instance for a free worker of the sandbox, so that they hang only if none of them has finished for so long.
            A plain judge that hangs cannot be ended, and its thread is left behind. A judge that must run on the main
            thread is waited for without limit.
    """
    attempts = [attempt if isinstance(attempt, Attempt) else Attempt(*attempt) for attempt in attempts]
    if environment.judges_batches:
        return [_checked(result) for result in _judge_together(environment, attempts, seconds)]
    results = _attempt_all(environment, [(attempt.task, attempt.completion) for attempt in attempts], seconds)
    waiting = {index: result for index, result in enumerate(results) if inspect.isawaitable(result)}
    if waiting:
        for index, result in zip(waiting, _wait_for_all(list(waiting.values()), seconds), strict=True):
            results[index] = result
    return [_checked(result) for result in results]


def described(error: BaseException) -> str:
    """Say in one line what a judge failed with, and where in the judge's own code, where that can be told."""
    text = f"{type(error).__name__}: {error}"
    outside = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_PACKAGE)]
    own = [frame for frame in outside if not frame.filename.startswith(_LIBRARIES)] or outside
    return f"{text} ({own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else text


def _judge_together(environment: Environment, attempts: Sequence[Attempt], seconds: float | None) -> list[object]:
    """Call a judge of whole batches, and return what it gives for each attempt."""
    if not attempts:
        return []
    try:
        result: Any = environment.judge_batch(attempts)
    except Exception as error:
        result = error
    if inspect.isawaitable(result):
        (result,) = _wait_for_all([result], None if seconds is None else seconds * len(attempts))
    if isinstance(result, BaseException):
        return [result] * len(attempts)
    results = list(result)
    if len(results) != len(attempts):
        return [TypeError(f"The judge returned {len(results)} verdicts for {len(attempts)} completions.")] * len(
            attempts
        )
    return results


def _attempt_all(environment: Environment, pairs: Sequence[tuple[Task, str]], seconds: float | None) -> list[object]:
    """Call the judge for one pair after the other, on a thread that may be given up, and return what it gives."""
    if seconds is None or environment.judges_on_main_thread:
        return [_attempt(environment, task, completion) for task, completion in pairs]
    results: list[object] = []
    while len(results) < len(pairs):
        done: queue.SimpleQueue[object] = queue.SimpleQueue()
        remaining = pairs[len(results) :]
        threading.Thread(target=_attempt_into, args=(done, environment, remaining), daemon=True).start()
        for _ in remaining:
            try:
                results.append(done.get(timeout=seconds))
            except queue.Empty:
                results.append(_hanging(seconds))
                break
    return results


def _attempt_into(done: queue.SimpleQueue[object], environment: Environment, pairs: Sequence[tuple[Task, str]]) -> None:
    for task, completion in pairs:
        done.put(_attempt(environment, task, completion))


def _hanging(seconds: float) -> TimeoutError:
    return TimeoutError(f"the judge did not answer within {seconds:g} s")


def _attempt(environment: Environment, task: Task, completion: str) -> object:
    try:
        return environment.judge(task, completion)
    except Exception as error:
        return error


def _checked(result: object) -> Outcome:
    if isinstance(result, Exception):
        return result
    if isinstance(result, BaseException):
        return RuntimeError(f"The judge was stopped by {type(result).__name__}.")
    if not isinstance(result, Verdict):
        return TypeError(f"The judge must return a Verdict, but returned {type(result).__name__}.")
    try:
        finite = math.isfinite(result.reward)
    except TypeError:
        finite = False
    if not finite:
        return ValueError(f"The judge's reward must be a finite number, but is {result.reward!r}.")
    if result.feedback is not None:
        # A judge may quote half of a surrogate pair from a completion, which no tokenizer takes as text.
        return replace(result, feedback=result.feedback.encode("utf-8", "replace").decode())
    return result


def _wait_for_all(awaitables: list[Awaitable[Any]], seconds: float | None) -> list[object]:
    async def gather() -> list[object]:
        tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
        pending = set(tasks)
        while pending:
            finished, pending = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not finished:
                break
        for task in pending:
            task.cancel()
        results: list[object] = []
        for task in tasks:
            if task in pending:
                results.append(_hanging(seconds or 0))
            else:
                results.append(asyncio.CancelledError() if task.cancelled() else task.exception() or task.result())
        return results

    return run(gather())
