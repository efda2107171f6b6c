"""Async work from plain code, wherever that runs."""

from __future__ import annotations

import asyncio
import atexit
import functools
import threading
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def run_all(awaitables: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all, in their order; the first exception of any."""

    async def gather() -> list[T]:
        return list(await asyncio.gather(*awaitables))

    return run(gather())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, which is cancelled where the waiting is interrupted."""
    future = asyncio.run_coroutine_threadsafe(coroutine, event_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
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
