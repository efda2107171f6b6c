"""Mathematical problems with a boxed answer, which math-verify compares with the right one as mathematics."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from vpd.config import ConfigError
from vpd.environments.answers import parse_integer, quoted
from vpd.environments.base import Environment, Split
from vpd.environments.math_answers import last_boxed
from vpd.environments.processes import JudgeOutOfTimeError, JudgeProcesses
from vpd.environments.rows import Row, load_rows
from vpd.environments.splits import check_split, cut_splits, question_key
from vpd.environments.worked import change_digit
from vpd.types import Demonstration, Task, Verdict

INSTRUCTION = "Reason step by step, and put your final answer within \\boxed{}."
_COMPARE = "vpd.environments.math_answers:compare"


@dataclass(frozen=True, slots=True)
class PublishedProblems:
    """A published set of problems: its place on the hub, its columns, and the configuration where there are several."""

    path: str
    problem: str = "problem"
    answer: str = "answer"
    config: str | None = None


NAMED: Mapping[str, PublishedProblems] = {
    "dapo-math": PublishedProblems("open-r1/DAPO-Math-17k-Processed", "prompt", "solution", "en"),
    "math-500": PublishedProblems("HuggingFaceH4/MATH-500"),
    "aime24": PublishedProblems("HuggingFaceH4/aime_2024"),
    "aime25": PublishedProblems("math-ai/aime25"),
    "amc23": PublishedProblems("math-ai/amc23", "question"),
}


class Math(Environment):
    """Problems from rows with a problem and a right answer.

    math-verify compares the last ``\\boxed{...}`` of a completion with the right answer, in a process that is ended
    where the comparison takes too long; the completion has then failed. The reward is 1 or 0.

    Args:
        path: A name of :data:`NAMED`, or a JSONL file, folder or hub id with columns ``problem`` and ``answer``.
        final_path: The same, for the final split, which takes all of its problems; by default the final split is made
            of the test problems of ``path``.
        feedback: How much the text says: ``outcome`` tells right from wrong and names errors of form; ``reference``
            also gives the right answer.
        seconds: The time limit of one comparison.
        selection_size: How many training problems become the selection split.
        final_size: How many test problems the final split has at most (all by default); without test problems it takes
            this many training problems.
        seed: Decides the split.

    Raises:
        ConfigError: math-verify is not installed, or the data is missing or malformed.
    """

    def __init__(
        self,
        path: str,
        *,
        final_path: str | None = None,
        feedback: Literal["outcome", "reference"] = "outcome",
        seconds: float = 5.0,
        selection_size: int = 100,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError('The environment math needs the package math-verify: pip install "vpd-rl[math]".')
        tasks = _load(path)
        train, test = tasks.get("train", []), tasks.get("test")
        if final_path is not None:
            test = [task for part in _load(final_path).values() for task in part]
        if test is None and final_size is None:
            raise ConfigError(
                f"{path} has no test problems: set data.final_path, or take some training problems by data.final_size."
            )
        self.feedback = feedback
        self.seed = seed
        self._tasks = cut_splits(
            train,
            test,
            key=lambda task: question_key(task.prompt[-1]["content"]),
            selection_size=selection_size,
            final_size=final_size,
            seed=seed,
            origin=path,
        )
        self._processes = JudgeProcesses(seconds)

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    async def judge(self, task: Task, completion: str) -> Verdict:
        boxed = last_boxed(completion)
        details: dict[str, Any] = {"answer": boxed}
        if boxed is None or not boxed.strip():
            what = "nothing stands in \\boxed{}" if boxed is not None else "it has no \\boxed{...}"
            return self._verdict(task, 0.0, f"Your answer could not be read: {what}.", details)
        try:
            outcome = await self._processes.call(_COMPARE, boxed, task.reference)
        except JudgeOutOfTimeError:
            text = f"Your answer, {quoted(boxed)}, could not be compared in time: write it more simply."
            return self._verdict(task, 0.0, text, details)
        if outcome == "unreadable":
            text = f"Your answer, {quoted(boxed)}, could not be read as mathematics."
        elif outcome.startswith("too"):
            text = f"Your answer, {quoted(boxed)}, is {outcome} to be compared: write it more simply."
        else:
            text = f"Your answer, {quoted(boxed)}, was compared and is {outcome}."
        return self._verdict(task, float(outcome == "right"), text, details)

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return answers in the right form but without reasoning, because the data has none."""
        rng = random.Random(self.seed)
        return [
            Demonstration(task, _boxed(str(task.reference)), _boxed(_changed(str(task.reference), rng)))
            for task in self._tasks["train"][:count]
        ]

    def _verdict(self, task: Task, reward: float, text: str, details: dict[str, Any]) -> Verdict:
        if self.feedback == "reference":
            text = f"{text} The right answer is {task.reference}."
        return Verdict(reward, text, details)


def _changed(answer: str, rng: random.Random) -> str:
    number = parse_integer(answer)
    return f"{answer} + 1" if number is None else str(change_digit(number, rng))


def _load(path: str) -> dict[str, list[Task]]:
    published = NAMED.get(path, PublishedProblems(path))
    rows = load_rows(published.path, published.config)
    # The path is part of the id, because two sets of problems may number their rows alike.
    return {split: [_task(row, published, f"{path}/{row.id}") for row in part] for split, part in rows.items()}


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _task(row: Row, published: PublishedProblems, id: str) -> Task:
    problem, answer = row.values.get(published.problem), row.values.get(published.answer)
    if not isinstance(problem, str) or not problem.strip():
        raise ConfigError(f"{row.origin}: the column {published.problem!r} must be a text that is not empty.")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ConfigError(f"{row.origin}: the column {published.answer!r} must be a text or a number, got {answer!r}.")
    text = f"{problem.strip()}\n\n{INSTRUCTION}"
    return Task(id, [{"role": "user", "content": text}], {}, last_boxed(str(answer)) or str(answer).strip())
