"""A pool of processes for judges that may hang: such a process can be ended, so that the run does not hang with it.

Each worker is a fresh interpreter that knows nothing of the caller's script. multiprocessing would import that script
once more, and a script without a ``__main__`` guard would then train a second time. Forking is not safe either, because
torch has threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import queue
import resource
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vpd.sandbox.namespaces import die_with_parent

_START_SECONDS = 60.0
_SERVE = (
    "import sys; sys.path[:0] = {path!r}; from vpd.environments.processes import serve; serve({memory_mb}, {parent})"
)


class JudgeOutOfTimeError(Exception):
    """The call took longer than its time limit, and its process was ended."""


class JudgeProcessError(RuntimeError):
    """The judge itself failed: it raised, or its process ended."""


class JudgeProcesses:
    """A pool of processes that call module-level functions with plain values.

    Args:
        seconds: The time limit of one call.
        memory_mb: The limit of each process's address space.
        workers: How many processes there are, by default one for each core; each starts at its first use.
    """

    def __init__(self, seconds: float, memory_mb: int = 4096, workers: int | None = None) -> None:
        self._seconds = seconds
        self._memory_mb = memory_mb
        # The kernel ends a process with the thread that started it, so that this thread must last as long as the pool.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="judge-processes")
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(workers or os.cpu_count() or 1):
            self._idle.put(None)

    async def call(self, function: str, *arguments: Any) -> Any:
        """Call ``package.module:function`` without holding up the event loop.

        Raises:
            JudgeOutOfTimeError: The function took too long.
            JudgeProcessError: The function raised an exception, whose text the error repeats, or ended its process.
        """
        return await asyncio.to_thread(self._call, function, arguments)

    def _call(self, function: str, arguments: tuple[Any, ...]) -> Any:
        process = self._idle.get()
        try:
            if process is None:
                process = self._starter.submit(_Process, self._memory_mb).result()
            answer = process.ask({"function": function, "arguments": arguments}, self._seconds)
        except BaseException:
            if process is not None:
                process.end()
            process = None
            raise
        finally:
            self._idle.put(process)
        if "error" in answer:
            raise JudgeProcessError(answer["error"])
        return answer["value"]


class _Process:
    def __init__(self, memory_mb: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(path=sys.path, memory_mb=memory_mb, parent=os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        weakref.finalize(self, _end, self._process)
        self._begun = False

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        if not self._begun:
            # The imports take time, which must not count against the first rollout.
            self._line(_START_SECONDS)
            self._begun = True
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise JudgeProcessError(f"the judge's process has ended: {error}") from error
        return json.loads(self._line(seconds))

    def end(self) -> None:
        _end(self._process)

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise JudgeOutOfTimeError(f"the judge took longer than {seconds:g} s")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise JudgeProcessError(f"the judge's process ended with code {self._process.wait()}")
                data += part
        return data


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def serve(memory_mb: int, parent: int) -> None:
    """Serve in the process: call the function that each line of JSON asks for, until standard input ends.

    The process ends with its parent, also in the middle of a call and when the parent is killed.
    """
    if sys.platform == "linux":
        die_with_parent()
    if os.getppid() != parent:
        return
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers = os.fdopen(os.dup(1), "w")
    # Standard output leads nowhere, because whatever a judge prints would be read as an answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for request in _requests(answers):
        module, _, name = request["function"].partition(":")
        try:
            value = getattr(importlib.import_module(module), name)(*request["arguments"])
            answer = json.dumps({"value": value})
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        answers.write(f"{answer}\n")
        answers.flush()


def _requests(answers: Any) -> Iterator[dict[str, Any]]:
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        yield json.loads(line)
