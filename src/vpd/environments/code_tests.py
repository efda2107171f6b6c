"""The tests of a programming problem, and the function that runs a program against them in the sandbox.

The program's process only produces output and values; the expected ones never enter it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from vpd.sandbox import CallResult, Limits, ProgramResult, Sandbox, values
from vpd.sandbox.program import PROGRAM_NAME

_SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
# How the interpreter begins to print an exception; one that is raised while the source is compiled has no traceback.
_EXCEPTION = re.compile(
    rf'^(Traceback \(most recent call last\):|  File "{re.escape(PROGRAM_NAME)}", line \d+)', re.MULTILINE
)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class OutputTest:
    """A test of a script: it reads ``input`` and must print ``output``; ``prelude`` runs before the program."""

    input: str
    output: str
    prelude: str = ""


@dataclass(frozen=True, slots=True)
class CallTest:
    """A test of a function: ``function(*arguments)`` must return ``expected``.

    Tuples and lists of equal items count as equal. ``prelude`` runs before the program; it holds the imports that the
    problem lets a program rely on.
    """

    function: str
    arguments: tuple[Any, ...]
    expected: Any
    prelude: str = ""


@dataclass(frozen=True, slots=True)
class CheckTest:
    """A test by a function ``check(candidate)`` that makes assertions, such as HumanEval's.

    The check runs in a sandbox of its own; each of its calls to ``candidate`` runs in the program's sandbox.

    Attributes:
        function: The name of the function that the program defines.
        source: The code that defines ``check`` and all that it needs.
    """

    function: str
    source: str


Test: TypeAlias = OutputTest | CallTest | CheckTest


@dataclass(frozen=True, slots=True)
class Failure:
    """The way in which a program failed a test.

    Attributes:
        kind: ``compile`` or ``error`` for an exception; ``wrong`` for a wrong result; ``time``, ``memory``, ``output``
            or ``disk`` for a limit that was reached.
        message: The exception's text.
        line: The line of the program where it happened.
        actual: The output or the value that the program gave instead.
    """

    kind: str
    message: str = ""
    line: int | None = None
    actual: str = ""


def run_tests(sandbox: Sandbox, code: str, tests: Sequence[Test], limits: Limits) -> list[Failure | None]:
    """Run a program on tests, and return for each test how it failed, or None where it passed.

    Raises:
        SandboxError: The sandbox does not work; nothing is known about the program.
    """
    results: list[Failure | None] = [None] * len(tests)
    calls = [index for index, test in enumerate(tests) if isinstance(test, CallTest)]
    if calls:
        first = tests[calls[0]]
        assert isinstance(first, CallTest)
        most = max(len(values.dumps(test.expected)) for test in tests if isinstance(test, CallTest))
        with sandbox.functions(code, _with_room(limits, most), prelude=first.prelude) as program:
            for index in calls:
                test = tests[index]
                assert isinstance(test, CallTest)
                answer = program.call(test.function, *test.arguments)
                results[index] = _failure_of_answer(answer, test.expected, loaded=program.loaded.error is None)
    out_of_time: Failure | None = None
    for index, test in enumerate(tests):
        if isinstance(test, OutputTest):
            # After one test that ran out of time the others count as failed too: an endless loop would take the whole
            # time in each of them.
            results[index] = out_of_time or _failure_of_output(sandbox, code, test, limits)
            failure = results[index]
            out_of_time = failure if failure is not None and failure.kind == "time" else None
        elif isinstance(test, CheckTest):
            results[index] = _failure_of_check(sandbox, code, test, limits)
    return results


def _failure_of_error(message: str, line: int | None, *, began: bool) -> Failure:
    """Make a failure of an exception; a program that began to run has compiled, whatever it then gave to ``eval``."""
    name = message.partition(":")[0]
    return Failure("compile" if name in _SYNTAX_ERRORS and not began else "error", message, line)


def _with_room(limits: Limits, expected: int) -> Limits:
    """Return limits that let a program give twice as many bytes as are expected."""
    return replace(limits, output_kb=max(limits.output_kb, 2 * expected // 1024 + 1))


def _failure_of_output(sandbox: Sandbox, code: str, test: OutputTest, limits: Limits) -> Failure | None:
    room = _with_room(limits, len(test.output.encode()))
    return _failure_of_script(sandbox.run(code, test.input, room, test.prelude), test.output)


def _failure_of_script(ended: ProgramResult, expected: str) -> Failure | None:
    if ended.stopped is not None:
        return Failure(ended.stopped)
    # A program may leave with any exit code behind the right output, but neither by an exception nor by a signal.
    left = ended.exit_code > 0 and _EXCEPTION.search(ended.errors) is None
    if ended.exit_code != 0 and not (left and same_output(ended.output, expected)):
        began = ended.errors.startswith("Traceback")
        return _failure_of_error(_last_line(ended), line_of_traceback(ended.errors), began=began)
    if not same_output(ended.output, expected):
        return Failure("wrong", actual=ended.output)
    return None


def _last_line(ended: ProgramResult) -> str:
    last = ended.errors.strip().rpartition("\n")[2]
    return last or f"the program ended with exit code {ended.exit_code}"


def line_of_traceback(text: str) -> int | None:
    """Return the number of the program's line that a traceback names last."""
    line = None
    for part in text.splitlines():
        before, found, after = part.partition(f'File "{PROGRAM_NAME}", line ')
        number = after.partition(",")[0]
        if found and not before.strip() and number.isdigit():
            line = int(number)
    return line


def _failure_of_answer(answer: CallResult, expected: Any, *, loaded: bool) -> Failure | None:
    if answer.stopped is not None:
        return Failure(answer.stopped, line=answer.line)
    if answer.error is not None:
        return _failure_of_error(answer.error.rpartition("\n")[2], answer.line, began=loaded)
    if not _same_value(answer.value, expected):
        return Failure("wrong", actual=_shown(answer.value))
    return None


def _failure_of_check(sandbox: Sandbox, code: str, test: CheckTest, limits: Limits) -> Failure | None:
    answers: list[CallResult] = []
    with sandbox.functions(code, limits) as program:

        def candidate(*arguments: Any) -> CallResult:
            answers.append(program.call(test.function, *arguments))
            return answers[-1]

        # The check waits for the program, which holds a worker: the check needs another one.
        source = f"{test.source}\n\ndef run_check():\n    check(outside)\n"
        with sandbox.companion().functions(source, limits, candidate) as referee:
            verdict = referee.call("run_check")
    if verdict.error is None:
        return None
    last = answers[-1] if answers else program.loaded
    if last.error is not None:
        return _failure_of_answer(last, None, loaded=program.loaded.error is None)
    if verdict.stopped is not None:
        return Failure(verdict.stopped)
    return Failure("wrong", actual=_shown(last.value))


def same_output(actual: str, expected: str) -> bool:
    """Tell whether two outputs are equal line by line, up to white space at the ends and the spelling of numbers."""
    actual_lines, expected_lines = ([line.strip() for line in text.strip().split("\n")] for text in (actual, expected))
    return len(actual_lines) == len(expected_lines) and all(
        a == b or _same_numbers(a.split(), b.split()) for a, b in zip(actual_lines, expected_lines, strict=True)
    )


def _same_numbers(actual: list[str], expected: list[str]) -> bool:
    # Decimal also reads 1_000, digits of other scripts and names, which no checker of a contest takes for numbers.
    if len(actual) != len(expected) or not all(map(_NUMBER.fullmatch, (*actual, *expected))):
        return False
    try:
        return all(Decimal(a) == Decimal(b) for a, b in zip(actual, expected, strict=True))
    except InvalidOperation:
        return False


def _same_value(actual: Any, expected: Any) -> bool:
    try:
        return bool(_with_lists(actual) == _with_lists(expected))
    except RecursionError:
        return False


def _with_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_with_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return value


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):
        # repr fails on an integer with more digits than Python converts to decimal, and on a value nested too deeply.
        return f"a very large {type(value).__name__}"
