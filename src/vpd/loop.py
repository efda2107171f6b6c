"""Runs async work from plain code, on a loop of its own."""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """Wait for all awaitables and return their results in order; raises the first exception of any of them."""

    async def gather() -> list[T]:
        return list(await asyncio.gather(*awaitables))

    return run(gather())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine and return its result; an interruption of the waiting cancels the coroutine."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Start one loop for the whole process, on a thread of its own.

    A notebook's own loop is already running, and network clients that a judge keeps belong to the loop of their first
    use, so that neither a new loop each time nor the caller's loop would do.
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
