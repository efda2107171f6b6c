"""Make small programming problems: functions that filter, change and summarise a list of numbers, with tests.

    python examples/make_code_tasks.py runs/code_tasks

The script writes train.jsonl and test.jsonl in the plain format of the environment ``code``; no problem is in both.
Each problem has public tests, private tests, a solution, and an attempt that a public test rejects.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """A step of a problem in words, in code (with a place for its argument), and as a function."""

    words: str
    code: str
    apply: Callable[[Any], Any]


@dataclass(frozen=True)
class Problem:
    """A problem: keep some numbers, change each of them twice, and summarise the results."""

    keep: Part
    first: Part
    second: Part
    summary: Part

    def prompt(self) -> str:
        steps = [part.words for part in (self.keep, self.first, self.second, self.summary)]
        return f"Write f(numbers), where numbers is a list. Step by step: {', then '.join(steps)}."

    def solution(self) -> str:
        changed = self.second.code.format(f"({self.first.code.format('x')})")
        values = f"{changed} for x in numbers if {self.keep.code}"
        return f"def f(numbers):\n    return {self.summary.code.format(values)}\n"

    def answer(self, numbers: list[int]) -> Any:
        return self.summary.apply([self.second.apply(self.first.apply(x)) for x in numbers if self.keep.apply(x)])


# Parts are grouped by kind, so that a few demonstrations can show each kind.
KEEPS = [
    [Part("keep the even numbers", "x % 2 == 0", lambda x: x % 2 == 0)],
    [Part("keep the odd numbers", "x % 2 == 1", lambda x: x % 2 == 1)],
    [Part(f"keep the numbers greater than {k}", f"x > {k}", lambda x, k=k: x > k) for k in range(1, 8)],
    [Part(f"keep the numbers less than {k}", f"x < {k}", lambda x, k=k: x < k) for k in range(1, 8)],
    [Part(f"drop the numbers equal to {k}", f"x != {k}", lambda x, k=k: x != k) for k in range(1, 8)],
    [Part(f"keep the multiples of {k}", f"x % {k} == 0", lambda x, k=k: x % k == 0) for k in range(3, 6)],
]
CHANGES = [
    [Part("square each", "{} ** 2", lambda x: x * x)],
    [Part("negate each", "-{}", lambda x: -x)],
    [Part(f"multiply each by {k}", f"{{}} * {k}", lambda x, k=k: x * k) for k in range(2, 8)],
    [Part(f"add {k} to each", f"{{}} + {k}", lambda x, k=k: x + k) for k in range(2, 8)],
    [Part(f"subtract {k} from each", f"{{}} - {k}", lambda x, k=k: x - k) for k in range(2, 8)],
]
SUMMARIES = [
    [Part("return the list", "[{}]", list)],
    [Part("return the list in ascending order", "sorted({})", sorted)],
    [Part("return the sum", "sum({})", sum)],
    [Part("return how many different ones there are", "len(set({}))", lambda v: len(set(v)))],
    [Part("return the largest, or 0 if there are none", "max([{}], default=0)", lambda v: max(v, default=0))],
    [Part("return the smallest, or 0 if there are none", "min([{}], default=0)", lambda v: min(v, default=0))],
]
PARTS = {"keep": KEEPS, "first": CHANGES, "second": CHANGES, "summary": SUMMARIES}


def problems(rng: random.Random) -> Iterator[Problem]:
    """Yield distinct problems without end; all kinds of parts come up soon."""
    seen = set()
    decks = {name: _deck(kinds, rng) for name, kinds in PARTS.items()}
    while True:
        problem = Problem(**{name: rng.choice(next(deck)) for name, deck in decks.items()})
        if problem.first.code != problem.second.code and problem.prompt() not in seen:
            seen.add(problem.prompt())
            yield problem


def _deck(kinds: list[list[Part]], rng: random.Random) -> Iterator[list[Part]]:
    """Yield each kind once in random order, and start again without end."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def row(problem: Problem, rng: random.Random) -> dict[str, Any]:
    """Write the problem as a row of the plain format."""
    # The public tests hold the empty list too: otherwise programs that forget it would be rewarded, and learned.
    public = [[], *(_numbers(rng, 4, 6) for _ in range(3))]
    private = [[], *(_numbers(rng, 1, 8) for _ in range(7))]
    attempt = next(
        wrong
        for wrong in _wrong(problem, rng)
        if any(wrong.answer(numbers) != problem.answer(numbers) for numbers in public)
    )
    return {
        "prompt": problem.prompt(),
        "function": "f",
        "tests": [{"arguments": [numbers], "expected": problem.answer(numbers)} for numbers in public],
        "private_tests": [{"arguments": [numbers], "expected": problem.answer(numbers)} for numbers in private],
        "solution": problem.solution(),
        "attempt": attempt.solution(),
    }


def _numbers(rng: random.Random, shortest: int, longest: int) -> list[int]:
    return [rng.randint(-9, 12) for _ in range(rng.randint(shortest, longest))]


def _wrong(problem: Problem, rng: random.Random) -> Iterator[Problem]:
    """Yield problems with one part changed, such as a hasty reader would have solved instead."""
    while True:
        name = rng.choice(list(PARTS))
        yield replace(problem, **{name: rng.choice(rng.choice(PARTS[name]))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    found = problems(rng)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("test", options.test), ("train", options.train)):
        path = options.folder / f"{name}.jsonl"
        rows = [row(problem, rng) for problem in itertools.islice(found, size)]
        path.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    main()
