"""The code that runs one program inside the sandbox, as a script or as a server of its functions.

This code shares the interpreter with the program, which may break it at will. So it decides nothing: the program's
output, returned values and exit code are read and judged outside. Its two entry points never return.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import gc
import io
import json
import linecache
import os
import site
import sys
import threading
import traceback
from types import ModuleType, TracebackType
from typing import Any

from vpd.sandbox import values

PROGRAM_NAME = "program.py"
_RECURSION_LIMIT = 50_000
"""How deep a program may call itself before it has set a limit of its own; LiveCodeBench's checker gives as much."""
_STREAMS = {f"/dev/{name}": number for number, name in enumerate(("stdin", "stdout", "stderr"))}
_STREAMS |= {f"{folder}/{number}": number for folder in ("/dev/fd", "/proc/self/fd") for number in range(3)}


def run_script(source: str, prelude: str) -> None:
    """Run the prelude and the source as ``__main__``, and end as the interpreter does.

    Threads are joined, exit handlers are called, and streams are flushed.
    """

    def run() -> None:
        namespace = _main_module().__dict__
        exec(compile(prelude, "prelude", "exec", dont_inherit=True), namespace)
        exec(_compiled(source), namespace)

    _finish(_attempt(run))


def serve_functions(source: str, prelude: str, requests: int, answers: int) -> None:
    """Run the prelude and the source, then call the program's functions on request.

    Each request and each answer is one line of JSON. A request is ``{"function": "name" or "Class.method",
    "arguments": values.dumps((args, kwargs))}``; an answer is ``{"value": values.dumps(...)}`` or ``{"error": text,
    "line": number}``. The first answer says how the source itself ran. During a call the program may call
    ``outside(*args)``: then ``{"outside": values.dumps(args)}`` goes out in place of an answer, and the next line that
    comes in holds the result.

    Args:
        source: The program.
        prelude: Code that runs before it in the same namespace.
        requests: The file descriptor that requests are read from.
        answers: The file descriptor that answers are written to.
    """
    module = _main_module()
    namespace = module.__dict__
    # The program is loaded for its functions; under this name, the part for use as a script does not run.
    namespace["__name__"] = "program"
    # Dataclasses and pickle look for a class's module here.
    sys.modules["program"] = module
    exec(compile(prelude, "prelude", "exec", dont_inherit=True), namespace)
    instances: dict[str, Any] = {}

    def call(request: dict[str, Any]) -> Any:
        args, kwargs = values.loads(request["arguments"])
        return _function(namespace, instances, request["function"])(*args, **kwargs)

    with open(requests, encoding="utf-8", closefd=False) as incoming:

        def outside(*args: Any) -> Any:
            _answer(answers, {"outside": values.dumps(args)})
            outcome = json.loads(incoming.readline())
            if "error" in outcome:
                raise RuntimeError(outcome["error"])
            return values.loads(outcome["value"])

        namespace["outside"] = outside
        _answer(answers, _outcome(lambda: exec(_compiled(source), namespace)))
        while line := incoming.readline():
            _answer(answers, _outcome(functools.partial(call, json.loads(line))))
    _finish(0)


def _main_module() -> ModuleType:
    module = ModuleType("__main__")
    module.__dict__["__file__"] = PROGRAM_NAME
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [PROGRAM_NAME]
    sys.setrecursionlimit(_RECURSION_LIMIT)
    sys.stdin, sys.stdout, sys.stderr = _stream(0, "<stdin>"), _stream(1, "<stdout>"), _stream(2, "<stderr>")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    # The interpreter runs without the module site, which defines exit, quit, help and copyright.
    site.setquit()
    site.sethelper()
    site.setcopyright()
    builtins.open = io.open = _opening_streams_by_name(io.open)
    return module


def _stream(number: int, name: str) -> io.TextIOWrapper:
    """Open a standard stream as the interpreter does, with the attributes ``name`` and ``mode``."""
    raw = io.FileIO(number, "w" if number else "r", closefd=False)
    raw.name = name  # pyright: ignore[reportAttributeAccessIssue]
    buffer = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
    stream = io.TextIOWrapper(buffer, "utf-8", "replace", line_buffering=number == 2)
    stream.mode = "w" if number else "r"  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def _opening_streams_by_name(original: Any) -> Any:
    """Return an ``open`` that knows /dev/stdin and its like, since a program's own root has no /proc."""

    @functools.wraps(original)
    def opening(file: Any, *args: Any, **kwargs: Any) -> Any:
        number = _STREAMS.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
        return original(file if number is None else os.dup(number), *args, **kwargs)

    return opening


def _compiled(source: str) -> Any:
    # With this entry tracebacks show the program's lines.
    linecache.cache[PROGRAM_NAME] = (len(source), None, source.splitlines(keepends=True), PROGRAM_NAME)
    return compile(source, PROGRAM_NAME, "exec", dont_inherit=True)


def _attempt(action: Any) -> int:
    """Run ``action`` as the interpreter would run a script, and return the exit code."""
    try:
        action()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exception(type(error), error, _of_program(error.__traceback__))
        return 1
    return 0


def _outcome(action: Any) -> dict[str, Any]:
    try:
        return {"value": values.dumps(action())}
    except BaseException as error:
        frames = traceback.extract_tb(_of_program(error.__traceback__))
        lines = [frame.lineno for frame in frames if frame.filename == PROGRAM_NAME]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        if isinstance(error, values.NotPlainError):
            text = f"returned {error}, which cannot be compared"
        return {"error": text, "line": line}


def _of_program(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins in the program."""
    while trace is not None and trace.tb_frame.f_code.co_filename != PROGRAM_NAME:
        trace = trace.tb_next
    return trace


def _function(namespace: dict[str, Any], instances: dict[str, Any], name: str) -> Any:
    """Find ``name``, or ``Class.method`` of the one instance of the class, or a bare function in the method's place."""
    first, _, method = name.partition(".")
    if first not in namespace:
        if method in namespace:
            return namespace[method]
        raise NameError(f"name {first!r} is not defined")
    if not method:
        return namespace[first]
    if first not in instances:
        instances[first] = namespace[first]()
    return getattr(instances[first], method)


def _answer(descriptor: int, outcome: dict[str, Any]) -> None:
    data = json.dumps(outcome).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def _finish(code: int) -> None:
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    # Files that the program left open are written, and all its streams are flushed, as at the interpreter's own end.
    sys.modules["__main__"].__dict__.clear()
    gc.collect()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            code = code or 1
    os._exit(code)
