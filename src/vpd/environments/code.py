"""Programming problems: a program is run on tests, and the text is what a programmer would want to see of the outcome.

Public tests give reward and feedback in training; private ones decide an evaluation, and what they hold is never told.
"""

from __future__ import annotations

import asyncio
import builtins
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from vpd.config import ConfigError
from vpd.environments.base import Environment, Split
from vpd.environments.code_rows import HUMAN_EVAL, Problem, load_problems
from vpd.environments.code_tests import CallTest, CheckTest, Failure, OutputTest, Test, run_tests
from vpd.environments.splits import check_split, cut_splits, question_key, shuffled
from vpd.sandbox import Limits, Sandbox, SandboxError
from vpd.types import Demonstration, Task, Verdict

BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
OPEN_BLOCK = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n", re.IGNORECASE)
LONGEST_VALUE = 300
"""Characters of a value that a text quotes; longer ones are shortened in the middle."""

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
        path: ``humaneval``; rows in LiveCodeBench's format; or rows with ``prompt`` and ``tests`` (see
            :mod:`vpd.environments.code_rows`). A JSONL file, a folder with ``train.jsonl`` and perhaps
            ``test.jsonl``, or a Hugging Face dataset id.
        tests: which of them train: ``public`` as published; or ``half``, a seeded random half of all, which then counts
            as public, and all of them evaluate.
        final: ``held_out`` problems, or those of ``training`` again, judged by the tests that evaluate; a test file's
            problems are then training problems too.
        sandbox: the isolation of programs; ``auto`` takes the strongest that the machine offers.
        seconds, memory_mb: limits of one test.
        selection_size, final_size: problems taken from training where there is no test file.
        seed: of the splits and halves.

    Raises:
        ConfigError: the data cannot be used, or the machine cannot isolate programs.
    """

    def __init__(
        self,
        path: str,
        *,
        tests: Literal["public", "half"] = "public",
        final: Literal["held_out", "training"] = "held_out",
        sandbox: Literal["auto", "full", "bubblewrap", "landlock", "unsafe"] = "auto",
        seconds: float = 5.0,
        memory_mb: int = 512,
        selection_size: int = 100,
        final_size: int | None = None,
        seed: int = 0,
    ) -> None:
        self._limits = Limits(seconds=seconds, memory_mb=memory_mb)
        try:
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
        self._training = {task.id for task in self._tasks["train"]}

    def tasks(self, split: Split) -> Sequence[Task]:
        return check_split(self._tasks, split)

    async def judge(self, task: Task, completion: str) -> Verdict:
        code, problem_of_form = read_code(completion)
        if code is None:
            return Verdict(0.0, problem_of_form, {"passed": 0})
        problem: Problem = task.data["problem"]
        training = task.id in self._training
        told = training and bool(problem.public)
        tests = problem.public if told else problem.evaluation
        # The sandbox waits for programs, and the event loop must not.
        failures = await asyncio.to_thread(run_tests, self._sandbox, code, tests, self._limits)
        passed = failures.count(None)
        text = self._describe(code, tests, failures, told)
        return Verdict(float(passed == len(tests)), text, {"passed": passed, "tests": len(tests)})

    def truncated_feedback(self, task: Task) -> str:
        return "Your answer was cut off at the length limit before the program was finished. Write a shorter one."

    def demonstrations(self, count: int) -> Sequence[Demonstration]:
        """The data's solutions, behind its wrong attempts; problems without a solution are passed over."""
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
        """Without the examples of a docstring that the problem's own solution contradicts, as some of HumanEval do."""
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

    def _describe(self, code: str, tests: Sequence[Test], failures: Sequence[Failure | None], told: bool) -> str:
        failed = [(test, failure) for test, failure in zip(tests, failures, strict=True) if failure is not None]
        if not failed:
            names = "test passes" if len(tests) == 1 else f"{len(tests)} tests pass"
            return f"Your program was run. {'The' if len(tests) == 1 else 'All'} {names}."
        for kind in ("compile", "error"):
            for test, failure in failed:
                if failure.kind == kind:
                    return self._describe_error(code, test, failure, told)
        count = f"{len(failed)} of {len(tests)} tests fail."
        wrong = [pair for pair in failed if pair[1].kind == "wrong"]
        test, failure = min(wrong or failed, key=lambda pair: _size(pair[0]))
        if failure.kind == "wrong":
            shown = f" One of them:\n{_asked(test)}\n{_expected(test, failure)}" if told else ""
            return f"Your program was run. {count}{shown}"
        reached = _LIMITS[failure.kind].format(
            seconds=self._limits.seconds,
            memory_mb=self._limits.memory_mb,
            output_kb=self._limits.output_kb,
            disk_mb=self._limits.disk_mb,
        )
        return f"Your program {reached}. {count}" + (f" One of them:\n{_asked(test)}" if told else "")

    def _describe_error(self, code: str, test: Test, failure: Failure, told: bool) -> str:
        what = "does not compile" if failure.kind == "compile" else "ended with an error"
        message = shortened(failure.message)
        if not told:
            # The message, and the name of an exception of the program's own, may hold what a private test gave to it.
            name = failure.message.partition(":")[0]
            is_builtin = isinstance(getattr(builtins, name, None), type)
            message = name if is_builtin else "an exception of its own"
        text = f"Your program {what}: {message}"
        lines = code.splitlines()
        if failure.line is not None and 0 < failure.line <= len(lines):
            text += f"\nLine {failure.line}: {shortened(lines[failure.line - 1].strip())}"
        if told and failure.kind == "error":
            text += f"\n{_asked(test)}"
        return text


def read_code(completion: str) -> tuple[str | None, str]:
    """The last code block, or None and what is wrong with the form."""
    blocks = BLOCK.findall(completion)
    if blocks and blocks[-1].strip():
        return blocks[-1], ""
    if blocks:
        return None, "Your answer's code block is empty."
    if OPEN_BLOCK.search(completion):
        return None, "Your answer's code block is not closed: the program must stand between ```python and ```."
    return None, "Your answer holds no code block: the program must stand between ```python and ```."


def shortened(text: str, limit: int = LONGEST_VALUE) -> str:
    """The text, without its middle where it is long."""
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
    """Half of all tests, rounded up, as public ones, and all for evaluation; a check cannot be divided or quoted."""
    # Tests may hold lists, which cannot be hashed, and 1 and True, which are equal.
    tests = tuple({repr(test): test for test in (*problem.public, *problem.evaluation)}.values())
    visible = [index for index, test in enumerate(tests) if not isinstance(test, CheckTest)]
    order = shuffled(visible, random.Random(f"{seed}-{problem.id}").randrange(2**31))
    public = tuple(tests[index] for index in sorted(order[: (len(order) + 1) // 2]))
    return replace(problem, public=public, evaluation=tests)


def _demonstration(task: Task) -> Demonstration:
    problem: Problem = task.data["problem"]
    attempt = None if problem.attempt is None else f"```python\n{problem.attempt.strip()}\n```"
    return Demonstration(task, f"```python\n{str(problem.solution).strip()}\n```", attempt)
