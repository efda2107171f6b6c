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
import sys
import threading
import traceback
from types import ModuleType, TracebackType
from typing import Any

from vpd.sandbox import values

PROGRAM_NAME = "program.py"


def run_script(source: str) -> None:
    """Run the source as ``__main__`` and end as the interpreter does: join threads, call exit handlers, flush."""
    code = _attempt(lambda: exec(_compiled(source), _main_module().__dict__))
    _finish(code)


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
    exec(prelude, namespace)

    def call(request: dict[str, Any]) -> Any:
        args, kwargs = values.loads(request["arguments"])
        return _function(namespace, request["function"])(*args, **kwargs)

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
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "replace")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "replace")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "replace", line_buffering=True
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    return module


def _compiled(source: str) -> Any:
    # With this entry tracebacks show the program's lines.
    linecache.cache[PROGRAM_NAME] = (len(source), None, source.splitlines(keepends=True), PROGRAM_NAME)
    return compile(source, PROGRAM_NAME, "exec")


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


def _function(namespace: dict[str, Any], name: str) -> Any:
    first, *rest = name.split(".")
    if first not in namespace:
        raise NameError(f"name {first!r} is not defined")
    found = namespace[first]
    for part in rest:
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


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
