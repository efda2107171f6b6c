"""The tasks of the suite whose answer is a number or numbers."""

from __future__ import annotations

import random
import re
from itertools import pairwise

from benchmarks.held_out_tasks.base import OwnTask, Question, judge_number, lone_number, near, right, side, wrong
from benchmarks.held_out_tasks.vocabulary import WORDS
from vpd import Task, Verdict

_EQUATION = re.compile(r"(\d{1,9}) ?([+*x]) ?(\d{1,9}) ?= ?(\d{1,9})", re.ASCII)


class NumberTask(OwnTask):
    """A task with one right number; its data are ``answer`` and ``asked``, what the number is."""

    def judge(self, task: Task, completion: str) -> Verdict:
        return judge_number(completion, task.data["answer"], task.data["asked"])


class EquationTask(OwnTask):
    """One equation or several in a row, separated by commas; the data are ``steps``, each with its left side."""

    def judge(self, task: Task, completion: str) -> Verdict:
        wanted: list[tuple[str, int]] = task.data["steps"]
        steps = completion.strip().removesuffix(".").split(",")
        for place, step in enumerate(steps[: len(wanted)]):
            match = _EQUATION.fullmatch(step.strip())
            if match is None:
                return wrong(f'"{step.strip()[:40]}" is not an equation such as "1 {wanted[0][0].split()[1]} 1 = 1".')
            left, result = " ".join(match.group(1, 2, 3)).replace("x", "*"), int(match[4])
            if left != wanted[place][0]:
                begins = "the question" if place == 0 else "the result before it and the next number"
                return wrong(f'The left side "{left}" is not made of {begins}.')
            if result != wanted[place][1]:
                return wrong(f'"{step.strip()}" is wrong: {result} is too {side(result, wanted[place][1])}.')
        if len(steps) != len(wanted):
            return wrong(f"What you wrote is right so far, but you wrote {len(steps)} of {len(wanted)} equations.")
        checked = " and ".join(step.strip() for step in steps)
        return right(f"{checked}: the left side is that of the question, and the result is right.")


class SumOfTwo(EquationTask):
    """The sum of two numbers of two digits, written out as an equation."""

    def draw(self, rng: random.Random) -> Question:
        a, b = rng.randint(11, 99), rng.randint(11, 99)
        text = f"What is {a} plus {b}? Reply with the whole equation only."
        slip = near(a + b, rng, 12)
        return Question(text, f"{a} + {b} = {a + b}", f"{a} + {b} = {slip}", {"steps": [(f"{a} + {b}", a + b)]})


class SumOfThree(EquationTask):
    """The sum of three numbers, added one after another."""

    def draw(self, rng: random.Random) -> Question:
        a, b, c = rng.randint(2, 25), rng.randint(1, 9), rng.randint(1, 9)
        steps = [(f"{a} + {b}", a + b), (f"{a + b} + {c}", a + b + c)]
        slip = near(a + b, rng)
        text = f"Add {a}, {b} and {c} one after another. Reply with two equations, separated by a comma."
        answer = ", ".join(f"{left} = {result}" for left, result in steps)
        return Question(text, answer, f"{a} + {b} = {slip}, {slip} + {c} = {slip + c}", {"steps": steps})


class Product(EquationTask):
    """A product, written out as an equation."""

    def draw(self, rng: random.Random) -> Question:
        a, b = rng.randint(2, 12), rng.randint(2, 99)
        a, b = rng.choice([(a, b), (b, a)])
        text = f"Multiply {a} by {b}. Reply with the whole equation only."
        wrong_result = near(a * b, rng, 10)
        return Question(text, f"{a} * {b} = {a * b}", f"{a} * {b} = {wrong_result}", {"steps": [(f"{a} * {b}", a * b)]})


UNITS = {
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("kilograms", "grams"): 1000,
    ("centimetres", "millimetres"): 10,
    ("litres", "millilitres"): 1000,
    ("euros", "cents"): 100,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("weeks", "days"): 7,
    ("days", "hours"): 24,
    ("years", "months"): 12,
    ("feet", "inches"): 12,
}


class UnitConversion(NumberTask):
    """A quantity in a smaller unit."""

    def draw(self, rng: random.Random) -> Question:
        (large, small), factor = rng.choice(list(UNITS.items()))
        amount = rng.randint(2, 300 if factor % 10 == 0 and factor != 60 else 60)
        answer, asked = amount * factor, f"{amount} {large} in {small}"
        text = f"How many {small} are {amount} {large}? Reply with the number only."
        slips = {amount * other for other in (10, 100, 1000, 12, 60)} - {answer}
        return Question(text, str(answer), str(rng.choice(sorted(slips))), {"answer": answer, "asked": asked})


class LetterCount(NumberTask):
    """How often a letter occurs in a word or in two."""

    def draw(self, rng: random.Random) -> Question:
        phrase = " ".join(rng.sample(WORDS, 2))
        letter = rng.choice([rng.choice(phrase.replace(" ", "")), rng.choice("aeinorst")])
        text = f'How many times does the letter "{letter}" occur in "{phrase}"? Reply with the number only.'
        asked = f'the count of the letter "{letter}" in "{phrase}"'
        answer = phrase.count(letter)
        return Question(text, str(answer), str(near(answer, rng, 2)), {"answer": answer, "asked": asked})


class Sorting(OwnTask):
    """Numbers from the smallest to the largest."""

    def draw(self, rng: random.Random) -> Question:
        numbers = rng.sample(range(1, 100), 4)
        ordered = sorted(numbers)
        if numbers == ordered:
            numbers.reverse()
        given = ", ".join(map(str, numbers))
        text = (
            f"Sort these numbers from smallest to largest: {given}. Reply with the numbers only, separated by commas."
        )
        return Question(text, ", ".join(map(str, ordered)), given, {"numbers": numbers})

    def judge(self, task: Task, completion: str) -> Verdict:
        wanted = sorted(task.data["numbers"])
        parts = completion.strip().removesuffix(".").split(",")
        read = [lone_number(part) for part in parts]
        found = [number for number in read if number is not None]
        if len(found) < len(read):
            odd = parts[read.index(None)].strip()[:40]
            return wrong(f'You were asked for numbers separated by commas, but "{odd}" is not a number.')
        if found == wanted:
            return right(f"All {len(wanted)} numbers are there, and each is larger than the one before it.")
        if missing := [n for n in wanted if n not in found]:
            return wrong(f"{_listed(missing)} from the question {'is' if len(missing) == 1 else 'are'} missing.")
        if added := [n for n in found if n not in wanted]:
            return wrong(f"{_listed(added)} {'was' if len(added) == 1 else 'were'} not among the numbers to sort.")
        if len(found) > len(wanted):
            return wrong("You repeat a number: each should be written once.")
        first, second = next(pair for pair in pairwise(found) if pair[0] > pair[1])
        return wrong(f"The order is wrong: you put {first} before {second}, but {first} is larger.")


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, dict.fromkeys(numbers)))
