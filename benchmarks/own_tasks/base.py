"""What the suite's tasks have in common: questions from a list, cut into three splits."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from vpd import Demonstration, Environment, Task, Verdict
from vpd.environments import Split


class OwnTask(Environment):
    """A task as a user would write it: questions, a judge with a text, and a few worked answers.

    Attributes:
        demonstrations_used: How many worked answers the warm start learns from; 0 begins with the model as it comes.
        success: The reward from which an answer is right.
        final_size: How many questions the final split has at most.
    """

    demonstrations_used: ClassVar[int] = 0
    success: ClassVar[float] = 1.0
    final_size: ClassVar[int] = 300

    def __init__(self) -> None:
        tasks = [
            Task(f"{type(self).__name__}-{number}", [{"role": "user", "content": question}], data)
            for number, (question, data) in enumerate(self.questions())
        ]
        random.Random(0).shuffle(tasks)
        final = min(self.final_size, len(tasks) // 3)
        selection = min(50, len(tasks) // 5)
        self._splits: dict[Split, list[Task]] = {
            "final": tasks[:final],
            "selection": tasks[final : final + selection],
            "train": tasks[final + selection :],
        }

    @abstractmethod
    def questions(self) -> Sequence[tuple[str, dict[str, Any]]]:
        """Return all questions, each with what its judge needs; no two are alike."""

    @abstractmethod
    def right(self, data: dict[str, Any]) -> str:
        """Return a right answer."""

    @abstractmethod
    def wrong(self, data: dict[str, Any]) -> str:
        """Return a wrong answer, such as a learner would give."""

    @abstractmethod
    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        """Return the reward of an answer, without spaces at its ends, and what there is to say of it."""

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._splits[split]

    def judge(self, task: Task, completion: str) -> Verdict:
        reward, text = self.grade(dict(task.data), completion.strip())
        return Verdict(reward, text)

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        chosen = self._splits["train"][:count]
        return [Demonstration(task, self.right(dict(task.data)), self.wrong(dict(task.data))) for task in chosen]


class Number(OwnTask):
    """A task whose answer is one whole number, ``data["answer"]``."""

    demonstrations_used = 64

    def right(self, data: dict[str, Any]) -> str:
        return str(data["answer"])

    def wrong(self, data: dict[str, Any]) -> str:
        off = random.Random(str(sorted(data.items()))).choice([-10, -2, -1, 1, 2, 10])
        found = abs(data["answer"] + off)
        return str(found if found != data["answer"] else found + 1)

    def grade(self, data: dict[str, Any], answer: str) -> tuple[float, str]:
        given = answer.removesuffix(".")
        if given == str(data["answer"]):
            return 1.0, f"Your answer {given} was checked and is right."
        if not given.removeprefix("-").isdigit():
            return 0.0, "Your answer must be a number and nothing else. " + self.explain(data, given)
        return 0.0, f"Your answer {given} is wrong. " + self.explain(data, given)

    @abstractmethod
    def explain(self, data: dict[str, Any], given: str) -> str:
        """Say what is wrong with an answer."""
