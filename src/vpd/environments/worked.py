"""Worked answers: questions that are answered step by step, one step per line, and a reader of such answers.

The reader finds the first wrong line. A worked answer succeeds where every line and the final answer are right, and
nothing follows: an answer that is right by luck after wrong lines is a bad example to learn from. An answer that
rambles on is a bad example too, because the model that is shown it learns not to end.

Three datasets of reasoning-gym have steps on which everybody agrees. ``chain_sum``, and ``basic_arithmetic`` with ``+``
and ``-`` and without parentheses, add and subtract terms from left to right. ``products`` of two factors multiply by
the digits of the second factor, ones first, and then add the partial results.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vpd.environments.answers import first_line, parse_integer, quoted, split_at_answer, wrong_digits

# Thirty digits are more than any task asks for, and the bound keeps runaway lines away from int().
NUMBER = r"\(?(-?[0-9,]{1,30})\)?"
LINE = re.compile(rf"\s*{NUMBER}\s*([-+*])\s*{NUMBER}\s*=\s*{NUMBER}\s*\.?\s*")
CHAIN_SUM = re.compile(r"-?[0-9]+( [+-] -?[0-9]+)+")
SIGNS = str.maketrans({"×": "*", "·": "*", "−": "-", "–": "-"})  # noqa: RUF001
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True, slots=True)
class Result:
    """An operand that is the result of an earlier line; lines count from 0."""

    line: int


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a worked answer: an operation on numbers of the question or on earlier results."""

    left: int | Result
    operator: str
    right: int | Result

    def operands(self, results: list[int]) -> tuple[int, int]:
        """Return the two numbers, given the results of the earlier lines."""
        left, right = (results[x.line] if isinstance(x, Result) else x for x in (self.left, self.right))
        return left, right


@dataclass(frozen=True, slots=True)
class WorkedForm:
    """The form of a dataset's worked answers.

    Attributes:
        instruction: The text that asks for the form; the expression follows on the next line.
        steps: A function that turns an expression into steps, and raises ValueError where the form does not fit it.
    """

    instruction: str
    steps: Callable[[str], list[Step]]

    def prompt(self, expression: str) -> str:
        return f"{self.instruction}\n{expression}"


def chain_sum_steps(expression: str) -> list[Step]:
    """Work ``47 + 38 - 56`` from left to right; there is one step fewer than there are terms."""
    if CHAIN_SUM.fullmatch(expression) is None:
        raise ValueError("a chain sum is two numbers or more with + or - between them")
    first, *rest = expression.split()
    terms = list(zip(rest[::2], rest[1::2], strict=True))
    return [Step(Result(i - 1) if i else int(first), operator, int(term)) for i, (operator, term) in enumerate(terms)]


def products_steps(expression: str) -> list[Step]:
    """Work ``47 * 38``: multiply by each digit of the second factor but zeros, ones first, then add, a sum per line."""
    factors = [int(factor) for factor in expression.split(" * ")]
    if len(factors) != 2 or min(factors) < 0:
        raise ValueError("a worked product needs two factors that are not negative")
    left, right = factors
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(right))) if digit != "0"] or [0]
    products = [Step(left, "*", part) for part in parts]
    sums = [Step(Result(0 if i == 1 else len(parts) + i - 2), "+", Result(i)) for i in range(1, len(parts))]
    return products + sums


LEFT_TO_RIGHT = WorkedForm(
    'Calculate from left to right, one step per line ("a + b = c"), then write "Answer: " and the number.',
    chain_sum_steps,
)

WORKED_FORMS: Mapping[str, WorkedForm] = {
    "basic_arithmetic": LEFT_TO_RIGHT,
    "chain_sum": LEFT_TO_RIGHT,
    "products": WorkedForm(
        'Multiply by each digit of the second number, ones first, one per line ("a * b = c"), then add the results, '
        'one addition per line, then write "Answer: " and the number.',
        products_steps,
    ),
}


def write(steps: list[Step], changed_line: int | None = None, changed_result: int = 0) -> str:
    """Write the worked answer; line ``changed_line`` results in ``changed_result``, and the rest follows from it."""
    results: list[int] = []
    lines = []
    for index, step in enumerate(steps):
        left, right = step.operands(results)
        results.append(changed_result if index == changed_line else OPERATIONS[step.operator](left, right))
        lines.append(f"{left} {step.operator} {right} = {results[-1]}")
    return "\n".join([*lines, f"Answer: {results[-1]}"])


def write_wrong(steps: list[Step], rng: random.Random) -> str:
    """Write a worked answer with one wrong digit in one line, continued consistently to a wrong answer."""
    results: list[int] = []
    for step in steps:
        results.append(OPERATIONS[step.operator](*step.operands(results)))
    line = rng.randrange(len(steps))
    return write(steps, line, change_digit(results[line], rng))


def change_digit(number: int, rng: random.Random) -> int:
    """Change one digit of the number and keep the number of digits."""
    digits = list(str(abs(number)))
    position = rng.randrange(len(digits))
    leading = position == 0 and len(digits) > 1
    choices = [digit for digit in ("123456789" if leading else "0123456789") if digit != digits[position]]
    digits[position] = rng.choice(choices)
    return int("".join(digits)) * (-1 if number < 0 else 1)


class Reading(NamedTuple):
    """The judgement of a worked answer's steps.

    Attributes:
        is_right: Whether every step is there and right, the final answer is the last line's result, and nothing follows
            it.
        text: The feedback: it names each right line up to the first wrong one, and says what is wrong there.
    """

    is_right: bool
    text: str


def read(steps: list[Step], completion: str) -> Reading:
    """Read the lines of a worked answer up to the first wrong one.

    The text quotes the completion and names places of digits. It never states a number that the completion did not
    write.
    """
    before, answer = split_at_answer(completion)
    lines = [line for line in before.splitlines() if line.strip()]
    results: list[int] = []
    checked: list[str] = []
    for index, line in enumerate(lines):
        name = f"Line {index + 1}, {quoted(line)},"
        error = _line_error(steps, index, line, results)
        if error:
            return Reading(False, " ".join([*checked, f"{name} is wrong: {error}."]))
        checked.append(f"{name} is right.")
    if len(lines) < len(steps):
        stop = f"after line {len(lines)}" if lines else "before the first line"
        missing = f"The steps stop {stop}: {'some are' if lines else 'all are'} missing."
        return Reading(False, " ".join([*checked, missing]))
    if answer is None:
        return Reading(False, " ".join(checked))
    if parse_integer(first_line(answer)) != results[-1]:
        mismatch = f"The final answer, {quoted(first_line(answer))}, does not match the last line."
        return Reading(False, " ".join([*checked, mismatch]))
    if rest := answer.partition("\n")[2].strip():
        return Reading(False, " ".join([*checked, f"Nothing may follow the final answer, but {quoted(rest)} does."]))
    return Reading(True, " ".join([*checked, "Every step was checked. The final answer matches the last line."]))


def _line_error(steps: list[Step], index: int, line: str, results: list[int]) -> str | None:
    """Say what is wrong with a line whose predecessors are right; for a right line, note its result and return None."""
    match = LINE.fullmatch(line.translate(SIGNS))
    if match is None:
        return "it does not have the form of a step"
    if index >= len(steps):
        return "it is one step too many"
    left_text, operator, right_text, result_text = match.groups()
    numbers = [parse_integer(text) for text in (left_text, right_text, result_text)]
    if None in numbers:
        return "it does not have the form of a step"
    left, right, result = (number for number in numbers if number is not None)
    step = steps[index]
    wanted = step.operands(results)
    swapped = operator != "-" and (right, left) == wanted
    if operator != step.operator or ((left, right) != wanted and not swapped):
        return _operand_error(step, wanted, left, right, operator)
    value = OPERATIONS[operator](left, right)
    if result != value:
        return f"in the result of its arithmetic, {wrong_digits(result, value)}"
    results.append(result)
    return None


def _operand_error(step: Step, wanted: tuple[int, int], left: int, right: int, operator: str) -> str:
    earlier = isinstance(step.left, Result), isinstance(step.right, Result)
    if (earlier[0] and left != wanted[0]) or (earlier[1] and right != wanted[1]):
        return "it does not continue from the result of " + ("the lines before" if all(earlier) else "the line before")
    if operator != step.operator:
        return "it does not have the operation that comes next in the question"
    return "a number was skipped or miscopied"
