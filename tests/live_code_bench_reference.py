"""A checker after the rules of LiveCodeBench's, for trusted programs only: it runs them without any isolation.

    python live_code_bench_reference.py < cases.json > verdicts.json

A case has ``code``, ``function`` (None for scripts), and ``tests`` as pairs of texts. Its rules:

- All programs stand behind a list of star imports, with a recursion limit of 50,000.
- Scripts: a last ``if __name__ == "__main__":`` is unwrapped; imports go to the top level, and all else into a function
  that is called once a test, with standard input replaced; SystemExit is swallowed. Outputs are stripped and compared
  line by line, stripped again, as text and else as lists of decimal numbers.
- Functions: ``Solution`` is instantiated once where the code has the class, else the function is taken from the module.
  A returned tuple becomes a list, and values are compared by ``==``.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import signal
import sys
from decimal import Decimal
from types import ModuleType
from unittest import mock

MODULES = """
    string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json
""".split()  # noqa: SIM905
IMPORTS = "".join(f"from {name} import *\n" for name in [*MODULES, "builtins", "typing"])
IMPORTS += "".join(f"import {name}\n" for name in MODULES) + "sys.setrecursionlimit(50000)\n"
SECONDS = 3


def as_function(code: str) -> str:
    body = ast.parse(code).body
    last = body[-1]
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        body = [*body[:-1], *last.body]
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    rest = [node for node in body if node not in imports]
    function = ast.parse("def wrapped(): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    function.body = rest or function.body
    return "\n".join([IMPORTS, *map(ast.unparse, imports), ast.unparse(function)])


def load(code: str) -> ModuleType:
    module = ModuleType("solution")
    exec(compile(code, "solution", "exec", dont_inherit=True), module.__dict__)
    return module


def lines_agree(actual: str, expected: str) -> bool:
    if actual == expected:
        return True
    try:
        return [Decimal(word) for word in actual.split()] == [Decimal(word) for word in expected.split()]
    except ArithmeticError:
        return False


def script_passes(code: str, tests: list[list[str]]) -> bool:
    function = load(as_function(code)).wrapped
    for given, expected in tests:
        lines = iter(given.split("\n"))
        stdin = io.StringIO(given)
        stdin.readline = lambda *_, lines=lines: next(lines)  # pyright: ignore[reportAttributeAccessIssue]
        stdin.read = lambda *_, given=given: given  # pyright: ignore[reportAttributeAccessIssue]
        stdin.readlines = lambda *_, given=given: given.split("\n")  # pyright: ignore[reportAttributeAccessIssue]
        written = io.StringIO()
        opening = mock.patch("builtins.open", mock.mock_open(read_data=given))
        patches = (opening, mock.patch("sys.stdin", stdin), mock.patch("sys.stdout", written))
        with patches[0], patches[1], patches[2], contextlib.suppress(SystemExit):
            function()
        actual, right = ([line.strip() for line in text.strip().split("\n")] for text in (written.getvalue(), expected))
        if len(actual) != len(right) or not all(map(lines_agree, actual, right)):
            return False
    return True


def function_passes(code: str, name: str, tests: list[list[str]]) -> bool:
    module = load(IMPORTS + code)
    holder = module.Solution() if "class Solution" in code else module
    for given, expected in tests:
        value = getattr(holder, name)(*(json.loads(line) for line in given.split("\n") if line))
        if isinstance(value, tuple):
            value = list(value)
        if value != json.loads(expected):
            return False
    return True


def verdict(case: dict) -> bool:
    """Judge in a child, so that no program sees what another left behind."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        passed = False
        try:
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(silence, stream)
            signal.alarm(SECONDS)
            if case["function"] is None:
                passed = script_passes(case["code"], case["tests"])
            else:
                passed = function_passes(case["code"], case["function"], case["tests"])
        except BaseException:
            passed = False
        os.write(write, b"+" if passed else b"-")
        os._exit(0)
    os.close(write)
    said = os.read(read, 1)
    os.close(read)
    os.waitpid(pid, 0)
    return said == b"+"


if __name__ == "__main__":
    json.dump([verdict(case) for case in json.load(sys.stdin)], sys.stdout)
