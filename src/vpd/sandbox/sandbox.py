"""A pool of warm workers that run model-written Python behind the kernel's isolation.

    with Sandbox() as sandbox:
        ended = sandbox.run("print(int(input()) + 1)", stdin="41")
        with sandbox.functions("def add(a, b): return a + b") as program:
            answer = program.call("add", 1, 2)

The program's own process decides nothing: output and returned values come out as data, and are compared outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from vpd.sandbox import values
from vpd.sandbox.levels import choose_level
from vpd.sandbox.limits import Limits
from vpd.sandbox.worker import Level, ProgramResult, Worker

_REACHED = {
    "time": "ran out of time",
    "memory": "ran out of memory",
    "output": "wrote too much output",
    "disk": "wrote too much into files",
}


@dataclass(frozen=True, slots=True)
class CallResult:
    """The result of one call of a program's function.

    Attributes:
        value: The returned value, made of builtin values only; it has a meaning only where ``error`` is None.
        error: The exception as Python prints it, or a text on what else went wrong.
        line: The program's line where it went wrong, or None where that is not known.
        stopped: The limit that ended the program, as in :class:`ProgramResult`.
    """

    value: Any = None
    error: str | None = None
    line: int | None = None
    stopped: Literal["time", "memory", "output", "disk"] | None = None


class Sandbox:
    """A thread-safe pool of workers that run programs.

    Args:
        level: The isolation; ``auto`` takes the strongest that this machine offers. Only ``unsafe`` runs programs
            without isolation.
        workers: How many programs run at the same time, by default one for each core.
        limits: The limits of each program.

    Raises:
        SandboxError: The machine does not offer the level, or with ``auto`` any level at all.
    """

    def __init__(
        self, level: Level | Literal["auto"] = "auto", workers: int | None = None, limits: Limits | None = None
    ) -> None:
        self.level: Level = choose_level(level)
        self.limits = limits or Limits()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._workers = workers or os.cpu_count() or 1
        for _ in range(self._workers):
            self._idle.put(None)
        self._companion: Sandbox | None = None
        self._all: set[Worker] = set()
        self._lock = threading.Lock()

    def run(self, source: str, stdin: str = "", limits: Limits | None = None, prelude: str = "") -> ProgramResult:
        """Run a program as a script; ``prelude`` is code that runs before it in the same namespace.

        Raises:
            SandboxError: The program could not be run in isolation.
        """
        limits = limits or self.limits
        with self._worker() as worker:
            return worker.run_script(source, stdin, limits, prelude)

    @contextlib.contextmanager
    def functions(
        self,
        source: str,
        limits: Limits | None = None,
        outside: Callable[..., CallResult] | None = None,
        prelude: str = "",
    ) -> Iterator[Functions]:
        """Load a program, so that its functions can be called.

        Args:
            source: The program.
            limits: The limits of this program, in place of the sandbox's.
            outside: The function that answers the program's calls of ``outside(*args)``, for a program that calls
                another one; by default such a call is an unreadable answer, and so an error.
            prelude: Code that runs before the program in the same namespace, such as imports that it may rely on.

        Raises:
            SandboxError: The program could not be run in isolation.
        """
        with self._worker() as worker:
            program = Functions(worker, source, limits or self.limits, outside, prelude)
            try:
                yield program
            finally:
                program.close()

    def companion(self) -> Sandbox:
        """Return a second pool, made at first use, for programs that call programs of this one.

        With one pool such programs could wait for each other forever: each holds a worker while it waits for another.
        """
        with self._lock:
            if self._companion is None:
                self._companion = Sandbox(self.level, self._workers, self.limits)
            return self._companion

    def close(self) -> None:
        """End the workers."""
        if self._companion is not None:
            self._companion.close()
        with self._lock:
            for worker in self._all:
                worker.close()
            self._all.clear()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        worker = self._idle.get()
        try:
            if worker is not None and not worker.is_alive():
                # Somebody else killed it; perhaps the machine was out of memory.
                worker.close()
                with self._lock:
                    self._all.discard(worker)
                worker = None
            if worker is None:
                worker = Worker(self.level, self.limits.packages)
                with self._lock:
                    self._all.add(worker)
            yield worker
        except BaseException:
            # The worker's state is unknown after an error.
            broken, worker = worker, None
            if broken is not None:
                with self._lock:
                    self._all.discard(broken)
                broken.close()
            raise
        finally:
            self._idle.put(worker)


class Functions:
    """A program that stays alive between calls of its functions.

    A call that reaches a limit ends the program, and every later call returns the same error.

    Attributes:
        loaded: The result of running the source itself; its value has no meaning.
    """

    def __init__(
        self,
        worker: Worker,
        source: str,
        limits: Limits,
        outside: Callable[..., CallResult] | None = None,
        prelude: str = "",
    ) -> None:
        self._limits = limits
        self._outside = outside
        self._running = worker.start_functions(source, prelude, limits, seconds=3600.0)
        self._over: CallResult | None = None
        self.loaded = self._answer()

    def call(self, function: str, *args: Any, **kwargs: Any) -> CallResult:
        """Call ``name``, or ``Class.method``, with builtin values.

        All calls of methods of a class go to one instance. A function ``method`` serves where there is no such class.

        Raises:
            NotPlainError: An argument is not a builtin value.
        """
        request = {"function": function, "arguments": values.dumps((args, kwargs))}
        if self._over is None and self.loaded.error is None:
            self._running.send(json.dumps(request).encode() + b"\n")
            return self._answer()
        return self._over or self.loaded

    def close(self) -> None:
        """End the program."""
        self._running.abort()
        self._running.wait()

    def _answer(self) -> CallResult:
        deadline = time.monotonic() + self._limits.seconds
        line, stopped = self._running.read_line(self._limits.seconds)
        while self._outside is not None and line is not None and (asked := _arguments_of_outside(line)) is not None:
            self._running.send(_reply(self._outside(*asked)))
            line, stopped = self._running.read_line(deadline - time.monotonic())
        if line is None:
            # The program may have closed the channel and still be running, so it is aborted. A program that has ended
            # keeps its own exit code.
            self._running.abort()
            if stopped is None:
                ended = self._running.wait()
                self._over = CallResult(error=_how_it_ended(ended), stopped=ended.stopped)
            else:
                self._over = CallResult(error=_REACHED[stopped], stopped=stopped)
            return self._over
        try:
            answer = json.loads(line)
            if "value" in answer:
                return CallResult(values.loads(answer["value"]))
            # A text with half of a surrogate pair could not be encoded later on.
            error, number = str(answer["error"]).encode("utf-8", "replace").decode(), answer.get("line")
            stopped = "memory" if error.startswith("MemoryError") else None
            return CallResult(error=error, line=number if isinstance(number, int) else None, stopped=stopped)
        except values.NotPlainError as error:
            return CallResult(error=f"returned {error}")
        except (ValueError, TypeError, KeyError, RecursionError):
            # The program itself has written to the channel of answers.
            return CallResult(error="gave no readable answer")


def _arguments_of_outside(line: bytes) -> tuple[Any, ...] | None:
    """Return the arguments where a line of answers is a call of ``outside``; None where it is not."""
    try:
        arguments = values.loads(json.loads(line)["outside"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return arguments if isinstance(arguments, tuple) else None


def _reply(answer: CallResult) -> bytes:
    reply = {"value": values.dumps(answer.value)} if answer.error is None else {"error": answer.error}
    return json.dumps(reply).encode() + b"\n"


def _how_it_ended(ended: ProgramResult) -> str:
    if ended.stopped is not None:
        return _REACHED[ended.stopped]
    if ended.exit_code < 0:
        return f"was killed by {signal.Signals(-ended.exit_code).name}"
    return f"ended with exit code {ended.exit_code} before it answered"
