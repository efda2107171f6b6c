"""Programming problems: a program is run on tests, and the feedback tells what a programmer would want to see.

Public tests give the reward and the feedback in training. Private tests decide an evaluation, and no text quotes them.
"""

from __future__ import annotations

import asyncio
import builtins
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from vpd.config import ConfigError
from vpd.environments.base import Environment, Split
from vpd.environments.code_answer import read_code
from vpd.environments.code_rows import HUMAN_EVAL, Problem, load_problems
from vpd.environments.code_tests import CallTest, CheckTest, Failure, OutputTest, Test, run_tests
from vpd.environments.splits import check_split, cut_splits, question_key, shuffled
from vpd.sandbox import Limits, Sandbox, SandboxError, check_packages
from vpd.types import Demonstration, Task, Verdict

LONGEST_VALUE = 300
"""How many characters of a value a text quotes; a longer value is shortened in the middle."""

_LIMITS = {
    "time": "ran out of time: it was stopped after {seconds:g} s",
    "memory": "ran out of memory: it may use {memory_mb} MB",
    "output": "was stopped since it wrote too much output: it may write {output_kb} kB",
    "disk": "was stopped since it wrote too much into files: it may write {disk_mb} MB",
}


class Code(Environment):
    """Problems that a Python program solves, run in the sandbox.

    In training the reward is 1 where all public tests pass, and the feedback says what went wrong: the first error with
    its line, else the shortest failing test with input, expected and actual output. On ``selection`` and ``final`` the
    private tests decide (the public ones where there are no others), and the text quotes none of them. A problem
    without public tests is judged by its private ones in training too, with a text that quotes nothing.

    Args:
        path: ``humaneval``, or where the rows are: a JSONL file, a folder with ``train.jsonl`` and perhaps
            ``test.jsonl``, or a Hugging Face dataset id. The rows are in LiveCodeBench's format, or have ``prompt`` and
            ``tests`` (see :mod:`vpd.environments.code_rows`).
        tests: The tests that give the reward in training: ``public`` takes those that are published as public.
            ``half`` takes a seeded random half of all tests, which then counts as public; all of them evaluate.
        final: The problems of the final split: ``held_out`` ones, or the ``training`` problems again, judged by the
            tests that evaluate; a test file's problems are then training problems too.
        sandbox: How programs are isolated; ``auto`` takes the strongest isolation that the machine offers.
        limits: The limits of each program, by default those of :class:`vpd.sandbox.Limits`.
        selection_size: How many training problems become the selection split.
        final_size: How many problems the final split has at most; without a test file they are taken from training.
        seed: Decides the splits and the halves.

    Raises:
        ConfigError: The data cannot be used, or the machine cannot isolate programs.
    """

    def __init__(
        self,
        path: str,
        *,
        tests: Literal["public", "half"] = "public",
        final: Literal["held_out", "training"] = "held_out",
        sandbox: Literal["auto", "full", "bubblewrap", "landlock", "unsafe"] = "auto",
        limits: Limits | None = None,
        selection_size: int = 100,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self._limits = limits or Limits()
        try:
            check_packages(self._limits.packages)
            self._sandbox = Sandbox(sandbox, limits=self._limits)
        except SandboxError as error:
            raise ConfigError(str(error)) from error
        problems = load_problems(path)
        if path == HUMAN_EVAL:
            problems = {"train": self._without_wrong_examples(problems["train"])}
        if tests == "half":
            problems = {split: [_with_random_half(p, seed) for p in found] for split, found in problems.items()}
        found = {split: [_task(problem) for problem in of_split] for split, of_split in problems.items()}
        if final == "training":
            found = {"train": [task for of_split in found.values() for task in of_split]}
        self._tasks = cut_splits(
            found["train"],
            found.get("test"),
            key=lambda task: question_key(task.prompt[-1]["content"]),
            selection_size=selection_size,
            final_size=0 if final == "training" else final_size,
            seed=seed,
            origin=path,
        )
        if final == "training":
            again = [replace(task, id=f"{task.id} (evaluation)") for task in self._tasks["train"]]
            self._tasks["final"] = again[:final_size]
        self._training_ids = {task.id for task in self._tasks["train"]}

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    async def judge(self, task: Task, completion: str) -> Verdict:
        code, form_error = read_code(completion)
        if code is None:
            return Verdict(0.0, form_error, {"passed": 0})
        problem: Problem = task.data["problem"]
        may_quote = task.id in self._training_ids and bool(problem.public)
        tests = problem.public if may_quote else problem.evaluation
        # The sandbox waits for programs, and the event loop must not.
        failures = await asyncio.to_thread(run_tests, self._sandbox, code, tests, self._limits)
        passed = failures.count(None)
        text = self._describe(code, tests, failures, may_quote)
        return Verdict(float(passed == len(tests)), text, {"passed": passed, "tests": len(tests)})

    def truncated_feedback(self, task: Task) -> str:
        return "Your answer was cut off at the length limit before the program was finished. Write a shorter one."

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """Return the data's solutions with its wrong attempts; problems without a solution are passed over."""
        solved = [task for task in self._tasks["train"] if task.data["problem"].solution is not None]
        return [_demonstration(task) for task in solved[:count]]

    def close(self) -> None:
        """End the sandbox's workers; they also end with this process."""
        self._sandbox.close()

    def __enter__(self) -> Code:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _without_wrong_examples(self, problems: Sequence[Problem]) -> list[Problem]:
        """Drop the docstring examples that the problem's own solution contradicts; HumanEval has some of them."""
        with ThreadPoolExecutor() as threads:
            checked = threads.map(
                lambda problem: run_tests(self._sandbox, str(problem.solution), problem.public, self._limits), problems
            )
            return [
                replace(
                    problem,
                    public=tuple(t for t, failure in zip(problem.public, failures, strict=True) if failure is None),
                )
                for problem, failures in zip(problems, checked, strict=True)
            ]

    def _describe(self, code: str, tests: Sequence[Test], failures: Sequence[Failure | None], may_quote: bool) -> str:
        failed = [(test, failure) for test, failure in zip(tests, failures, strict=True) if failure is not None]
        if not failed:
            names = "test passes" if len(tests) == 1 else f"{len(tests)} tests pass"
            return f"Your program was run. {'The' if len(tests) == 1 else 'All'} {names}."
        for kind in ("compile", "error"):
            for test, failure in failed:
                if failure.kind == kind:
                    return self._describe_error(code, test, failure, may_quote)
        count = f"{len(failed)} of {len(tests)} tests fail."
        wrong = [pair for pair in failed if pair[1].kind == "wrong"]
        test, failure = min(wrong or failed, key=lambda pair: _size(pair[0]))
        if failure.kind == "wrong":
            shown = f" One of them:\n{_asked(test)}\n{_expected(test, failure)}" if may_quote else ""
            return f"Your program was run. {count}{shown}"
        reached = _LIMITS[failure.kind].format(
            seconds=self._limits.seconds,
            memory_mb=self._limits.memory_mb,
            output_kb=self._limits.output_kb,
            disk_mb=self._limits.disk_mb,
        )
        return f"Your program {reached}. {count}" + (f" One of them:\n{_asked(test)}" if may_quote else "")

    def _describe_error(self, code: str, test: Test, failure: Failure, may_quote: bool) -> str:
        what = "does not compile" if failure.kind == "compile" else "ended with an error"
        message = shortened(failure.message)
        if not may_quote:
            # The program may put what a private test gave it into a message, or into the name of its own exception.
            name = failure.message.partition(":")[0]
            is_builtin = isinstance(getattr(builtins, name, None), type)
            message = name if is_builtin else "an exception of its own"
        text = f"Your program {what}: {message}"
        lines = code.splitlines()
        if failure.line is not None and 0 < failure.line <= len(lines):
            text += f"\nLine {failure.line}: {shortened(lines[failure.line - 1].strip())}"
        if may_quote and failure.kind == "error":
            text += f"\n{_asked(test)}"
        return text


def shortened(text: str, limit: int = LONGEST_VALUE) -> str:
    """Cut the middle out of a text that is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _asked(test: Test) -> str:
    match test:
        case OutputTest():
            return f"Input:\n{shortened(test.input.rstrip())}"
        case CallTest():
            arguments = ", ".join(repr(argument) for argument in test.arguments)
            return f"Call: {test.function.rpartition('.')[2]}({shortened(arguments)})"
        case CheckTest():
            return ""


def _expected(test: Test, failure: Failure) -> str:
    match test:
        case OutputTest():
            return (
                f"Expected output:\n{shortened(test.output.rstrip())}\n"
                f"Your output:\n{shortened(failure.actual.rstrip()) or '(nothing)'}"
            )
        case CallTest():
            return f"Expected: {shortened(repr(test.expected))}\nYour result: {shortened(failure.actual)}"
        case CheckTest():
            return ""


def _size(test: Test) -> int:
    return len(_asked(test)) + len(_expected(test, Failure("wrong")))


def _task(problem: Problem) -> Task:
    return Task(problem.id, [{"role": "user", "content": problem.prompt}], {"problem": problem}, problem.solution)


def _with_random_half(problem: Problem, seed: int) -> Problem:
    """Make half of all tests, rounded up, the public ones, and let all of them evaluate.

    A check is never public, since it can be neither divided nor quoted.
    """
    # The key is the repr: tests may hold lists, which cannot be hashed, and 1 and True, which are equal.
    tests = tuple({repr(test): test for test in (*problem.public, *problem.evaluation)}.values())
    visible = [index for index, test in enumerate(tests) if not isinstance(test, CheckTest)]
    order = shuffled(visible, random.Random(f"{seed}-{problem.id}").randrange(2**31))
    public = tuple(tests[index] for index in sorted(order[: (len(order) + 1) // 2]))
    return replace(problem, public=public, evaluation=tests)


def _demonstration(task: Task) -> Demonstration:
    problem: Problem = task.data["problem"]
    attempt = None if problem.attempt is None else f"```python\n{problem.attempt.strip()}\n```"
    return Demonstration(task, f"```python\n{str(problem.solution).strip()}\n```", attempt)
