"""The tasks of the suite whose answer is one of the options."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from benchmarks.held_out_tasks.base import OwnTask, Question, right, wrong
from benchmarks.held_out_tasks.vocabulary import CATEGORIES, TOO_ALIKE
from vpd import Task, Verdict


class ChoiceTask(OwnTask):
    """One right option among several; the data are ``options``, ``answer`` and whatever :meth:`verdict_on` needs."""

    def judge(self, task: Task, completion: str) -> Verdict:
        options: list[str] = task.data["options"]
        written = completion.strip().removesuffix(".").lower()
        if written not in options:
            return wrong(f'You were asked for one of the options alone, but you wrote "{completion.strip()[:60]}".')
        is_right = written == task.data["answer"]
        text = self.verdict_on(task, written, is_right)
        return right(text) if is_right else wrong(text)

    def verdict_on(self, task: Task, option: str, is_right: bool) -> str:
        """Say why an option is right or wrong."""
        raise NotImplementedError


def _choice(ask: str, options: Sequence[str], answer: str, kind: str, rng: random.Random, **data: Any) -> Question:
    other = rng.choice([option for option in options if option != answer])
    text = f"{ask} {', '.join(options)}? Reply with the {kind} only."
    return Question(text, answer, other, {"options": list(options), "answer": answer, **data})


class LargestNumber(ChoiceTask):
    """Which of four numbers is the largest."""

    def draw(self, rng: random.Random) -> Question:
        numbers = rng.sample(range(10, 1000), 4)
        options = [str(number) for number in numbers]
        return _choice("Which number is the largest:", options, str(max(numbers)), "number", rng)

    def verdict_on(self, task: Task, option: str, is_right: bool) -> str:
        if is_right:
            return f"{option} is larger than each of the other three numbers."
        larger = sum(int(other) > int(option) for other in task.data["options"])
        return f"You chose {option}, but {larger} of the other numbers {'is' if larger == 1 else 'are'} larger."


class OddOneOut(ChoiceTask):
    """Which of four words does not belong with the others."""

    def draw(self, rng: random.Random) -> Question:
        same = rng.choice(list(CATEGORIES))
        other = rng.choice([name for name in CATEGORIES if name != same and {name, same} not in TOO_ALIKE])
        options, odd = rng.sample(CATEGORIES[same], 3), rng.choice(CATEGORIES[other])
        options.insert(rng.randrange(4), odd)
        return _choice("Which word does not belong with the others:", options, odd, "word", rng, same=same)

    def verdict_on(self, task: Task, option: str, is_right: bool) -> str:
        same = task.data["same"]
        if is_right:
            return f"The other three have something in common ({same}), and {option} does not share it."
        return f"You chose {option}, but {option} has something in common with two of the other words ({same})."
