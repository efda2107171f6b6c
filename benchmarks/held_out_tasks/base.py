"""The base of the suite's tasks: questions drawn from a seed, and cut into splits that share none."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpd import Environment, Task, Verdict
from vpd.environments import Split
from vpd.types import Demonstration

_MOST_REPEATS = 2000
"""After this many draws in a row that were all known, a generator counts as exhausted."""

_FEWEST_TO_TRAIN_ON = 400

_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        text: What the student is asked.
        answer: A right answer, for demonstrations.
        wrong: A wrong answer, for demonstrations.
        data: What the judge needs.
    """

    text: str
    answer: str
    wrong: str
    data: Mapping[str, Any] = field(default_factory=dict)


class OwnTask(Environment):
    """Questions that :meth:`draw` makes, distinct by their text.

    Where there are fewer distinct questions than the sizes ask for, training gives way first, down to 400, and then the
    final split.

    Args:
        seed: Decides which questions there are.
        train: The number of training questions.
        selection: The number of questions in the selection split.
        final: The number of final questions.
    """

    def __init__(self, seed: int = 0, train: int = 1000, selection: int = 100, final: int = 1000) -> None:
        rng, questions, repeats = random.Random(f"{type(self).__name__}-{seed}"), dict[str, Question](), 0
        wanted = train + selection + final
        while len(questions) < wanted and repeats < _MOST_REPEATS:
            question = self.draw(rng)
            repeats = repeats + 1 if question.text in questions else 0
            questions.setdefault(question.text, question)
        self._questions = list(questions.values())
        train = min(train, max(len(questions) - selection - final, min(_FEWEST_TO_TRAIN_ON, len(questions) // 2)))
        tasks = [self._task(index, question) for index, question in enumerate(self._questions)]
        held_out = train + selection
        self._tasks = {
            "train": tasks[:train],
            "selection": tasks[train:held_out],
            "final": tasks[held_out : held_out + final],
        }

    @abstractmethod
    def draw(self, rng: random.Random) -> Question:
        """Draw one question."""

    @abstractmethod
    def judge(self, task: Task, completion: str) -> Verdict:
        """Grade one completion at once."""

    def tasks(self, split: Split) -> list[Task]:
        return self._tasks[split]

    def demonstrations(self, count: int) -> list[Demonstration]:
        train = self.tasks("train")[:count]
        return [Demonstration(t, q.answer, q.wrong) for t, q in zip(train, self._questions, strict=False)]

    def _task(self, index: int, question: Question) -> Task:
        prompt = [{"role": "user", "content": question.text}]
        return Task(f"{type(self).__name__}-{index}", prompt, question.data, question.answer)


def right(text: str) -> Verdict:
    """Grade a right answer; the text says what was checked."""
    return Verdict(1.0, text)


def wrong(text: str) -> Verdict:
    """Grade a wrong answer; the text says what is wrong with it."""
    return Verdict(0.0, text)


def lone_number(completion: str) -> int | None:
    """Read a completion that is one whole number, perhaps with a full stop; None for anything else."""
    text = completion.strip().removesuffix(".").replace(",", "")
    # The bound keeps an endless row of digits from becoming a number.
    return int(text) if len(text) <= 20 and text.isascii() and _NUMBER.fullmatch(text) else None


def judge_number(completion: str, wanted: int, asked: str) -> Verdict:
    """Grade a completion that should be one whole number.

    Args:
        completion: What the student wrote.
        wanted: The right number.
        asked: What was asked, as it stands in the text: ``34 + 21``.
    """
    written = completion.strip()
    number = lone_number(written)
    if number is None:
        shown = written if len(written) <= 60 else written[:60] + "..."
        return wrong(f'You were asked for the number alone, but you wrote "{shown}".')
    if number == wanted:
        return right(f"{number} is {asked}: the number is right, and nothing else is written.")
    if number % 10 == wanted % 10 and abs(wanted) >= 10:
        return wrong(f"{number} is not {asked}. It is too {side(number, wanted)}, though its last digit is right.")
    return wrong(f"{number} is not {asked}. It is too {side(number, wanted)}.")


def side(number: int, wanted: int) -> str:
    """Say on which side of the right number a wrong one lies."""
    return "large" if number > wanted else "small"


def near(number: int, rng: random.Random, spread: int = 3) -> int:
    """Draw another number that is not negative and close to this one."""
    return rng.choice([n for n in range(max(0, number - spread), number + spread + 1) if n != number])


def words_of(text: str) -> list[str]:
    """Split a text into words; punctuation belongs to none."""
    return re.findall(r"[A-Za-z0-9]+(?:['\u2019-][A-Za-z0-9]+)*", text)


def sentence_ends(text: str) -> int:
    """Count the sentences of a text by the marks that close them."""
    return len(re.findall(r"[.!?]+(?=\s|$|[\"'\u201d])", text.strip()))
