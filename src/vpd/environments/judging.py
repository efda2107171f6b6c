"""Judging many completions, with plain and async judges alike."""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import math
import threading
from collections.abc import Awaitable, Sequence
from typing import TypeAlias

from vpd.environments.base import Environment
from vpd.types import Task, Verdict

Outcome: TypeAlias = Verdict | Exception
"""A verdict, or what the judge itself failed with: that rollout is then ungraded."""


def judge_all(environment: Environment, pairs: Sequence[tuple[Task, str]]) -> list[Outcome]:
    """The outcome of each (task, completion), in their order; async judges run concurrently.

    A judge that raises, or whose reward is not a finite number, is broken for that completion alone.
    """
    results = [_attempt(environment, task, completion) for task, completion in pairs]
    waiting = {index: result for index, result in enumerate(results) if inspect.isawaitable(result)}
    if waiting:
        for index, result in zip(waiting, _wait_for_all(list(waiting.values())), strict=True):
            results[index] = result
    return [_checked(result) for result in results]


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
    return result if finite else ValueError(f"The judge's reward must be a finite number, but is {result.reward!r}.")


def _wait_for_all(awaitables: list[Awaitable[Verdict]]) -> list[Verdict | BaseException]:
    async def gather() -> list[Verdict | BaseException]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop on a thread of its own for the whole process.

    A notebook's loop is already running, and network clients that a judge keeps belong to the loop of their first use.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="vpd-judges", daemon=True)
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()

    atexit.register(stop)
    return loop
