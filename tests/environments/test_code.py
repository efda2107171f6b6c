"""Programs are run, and the text says what a programmer would want to know, but never quotes a private test."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import zlib
from collections.abc import Iterator

import pytest

from vpd import ConfigError
from vpd.config import CodeData
from vpd.config.data import CodeLimits
from vpd.environments import Code, judge_all, make_environment
from vpd.environments.code import shortened
from vpd.environments.code_answer import read_code
from vpd.environments.code_tests import same_output
from vpd.sandbox import Limits, SandboxError, choose_level
from vpd.types import Verdict

try:
    choose_level("auto")
except SandboxError as error:
    pytest.skip(str(error), allow_module_level=True)

ADD = {
    "prompt": "Add two numbers.",
    "function": "add",
    "tests": [{"arguments": [1, 2], "expected": 3}, {"arguments": [10**9, 5], "expected": 10**9 + 5}],
    "private_tests": [{"arguments": [77, 1], "expected": 78}],
    "solution": "def add(a, b):\n    return a + b\n",
    "attempt": "def add(a, b):\n    return a - b\n",
}
DOUBLE = {
    "prompt": "Print twice the number.",
    "tests": [{"input": "4\n", "output": "8\n"}, {"input": "100\n", "output": "200\n"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    rows = [{**ADD, "prompt": f"Add two numbers, {i}."} for i in range(3)]
    rows += [{**DOUBLE, "prompt": f"Print twice the number, {i}."} for i in range(3)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "test.jsonl").write_text(json.dumps({**ADD, "prompt": "Add two numbers, at last."}))
    return folder


@pytest.fixture(scope="module")
def environment(folder) -> Iterator[Code]:
    made = Code(str(folder), limits=Limits(seconds=1, memory_mb=256, output_kb=64), selection_size=1)
    yield made
    made.close()


def task(environment, kind, split="train"):
    return next(t for t in environment.tasks(split) if kind in t.prompt[0]["content"])


def judged(environment, chosen, program) -> Verdict:
    verdict = asyncio.run(environment.judge(chosen, f"Here it is.\n```python\n{program}\n```"))
    assert isinstance(verdict, Verdict)
    return verdict


@pytest.mark.parametrize(
    ("kind", "program", "reward", "text"),
    [
        ("Add", "def add(a, b):\n    return a + b", 1.0, "Your program was run. All 2 tests pass."),
        ("twice", "print(2 * int(input()))", 1.0, "Your program was run. All 2 tests pass."),
        (
            "Add",
            "def add(a, b):\n    return a - b",
            0.0,
            "Your program was run. 2 of 2 tests fail. One of them:\nCall: add(1, 2)\nExpected: 3\nYour result: -1",
        ),
        (
            "Add",
            "def add(a, b):\n    return a + b if a < 9 else None",
            0.0,
            "1 of 2 tests fail. One of them:\nCall: add(1000000000, 5)\nExpected: 1000000005\nYour result: None",
        ),
        (
            "twice",
            "print(int(input()) + 4)",
            0.0,
            "1 of 2 tests fail. One of them:\nInput:\n100\nExpected output:\n200\nYour output:\n104",
        ),
        ("twice", "pass", 0.0, "Input:\n4\nExpected output:\n8\nYour output:\n(nothing)"),
        (
            "Add",
            "def add(a, b)\n    return a",
            0.0,
            "Your program does not compile: SyntaxError: expected ':'\nLine 1: def add(a, b)",
        ),
        (
            "twice",
            "x = int(input())\nif x:\nprint(x)",
            0.0,
            "IndentationError: expected an indented block after 'if' statement on line 2\nLine 3: print(x)",
        ),
        (
            "Add",
            "def add(a, b):\n    c = a / 0\n    return c",
            0.0,
            "Your program ended with an error: ZeroDivisionError: division by zero\nLine 2: c = a / 0\nCall: add(1, 2)",
        ),
        (
            "twice",
            "def read():\n    return int('x' + input())\n\nprint(read())",
            0.0,
            "ended with an error: ValueError: invalid literal for int() with base 10: 'x4'\n"
            "Line 2: return int('x' + input())\nInput:\n4",
        ),
        ("Add", "def plus(a, b):\n    return a + b", 0.0, "ended with an error: NameError: name 'add' is not defined"),
        ("twice", "while True:\n    pass", 0.0, "Your program ran out of time: it was stopped after 1 s. 2 of 2 tests"),
        ("Add", "def add(a, b):\n    while True:\n        pass", 0.0, "Your program ran out of time"),
        ("Add", "def add(a, b):\n    return bytearray(10**12)", 0.0, "ran out of memory: it may use 256 MB"),
        ("twice", "while True:\n    print(1)", 0.0, "wrote too much output"),
        ("twice", "import sys\nsys.exit(3)", 0.0, "the program ended with exit code 3"),
        (
            "Add",
            "def add(a, b):\n    return [a + b, object()]",
            0.0,
            "returned a value of type object, which cannot be",
        ),
        ("Add", "def add(a, b):\n    return 'x' * 10**4", 0.0, "Your result: 'xxxx"),
        (
            "Add",
            "def add(a, b):\n    return {i * (2**61 - 1): 0 for i in range(100)}",
            0.0,
            "Your program ended with an error: returned a collection of many keys with the same hash",
        ),
        ("Add", "def add(a, b):\n    return eval('a +')", 0.0, "Your program ended with an error: SyntaxError"),
        ("twice", "eval('1 +')", 0.0, "Your program ended with an error: SyntaxError"),
    ],
)
def test_the_text_says_what_a_programmer_would_want_to_know(environment, kind, program, reward, text):
    verdict = judged(environment, task(environment, kind), program)
    assert verdict.reward == reward
    assert text in (verdict.feedback or "")
    assert len(verdict.feedback or "") < 900


def test_private_tests_decide_the_evaluation_and_are_never_told(environment):
    chosen = task(environment, "at last", "final")
    assert judged(environment, chosen, ADD["solution"]).reward == 1.0
    # This program knows the public tests by heart, and puts its arguments into the error's text.
    cheat = "def add(a, b):\n    if b in (2, 5):\n        return a + b\n    raise ValueError(f'{a} {b}')"
    assert judged(environment, task(environment, "Add"), cheat).reward == 1.0
    texts = {
        cheat: "Your program ended with an error: ValueError\nLine 4: raise ValueError(f'{a} {b}')",
        "def add(a, b):\n    return 0": "Your program was run. 1 of 1 tests fail.",
        "def add(a, b):\n    raise SyntaxError(f'{a} {b}')": ("Your program ended with an error: SyntaxError"),
        "def add(a, b):\n    raise type(f'{a}', (Exception,), {})": (
            "Your program ended with an error: an exception of its own\nLine 2: raise type(f'{a}', (Exception,), {})"
        ),
        "def add(a, b):\n    while True:\n        pass": (
            "Your program ran out of time: it was stopped after 1 s. 1 of 1 tests fail."
        ),
    }
    for program, text in texts.items():
        verdict = judged(environment, chosen, program)
        assert (verdict.reward, verdict.feedback) == (0.0, text)


def test_half_of_the_tests_may_hold_lists(tmp_path):
    tests = [{"arguments": [[i]], "expected": [i]} for i in (1, 2, True)]
    row = {"prompt": "Copy it.", "function": "f", "tests": tests}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "prompt": f"Copy it, {i}."}) for i in range(3)))
    with Code(str(path), tests="half", selection_size=1, final_size=1) as environment:
        problem = environment.tasks("train")[0].data["problem"]
        assert (len(problem.public), len(problem.evaluation)) == (2, 3)


def test_half_of_the_tests_train_and_all_evaluate(folder):
    with Code(str(folder), tests="half", selection_size=1) as environment:
        problem = task(environment, "Add").data["problem"]
        assert len(problem.public) == 2
        assert len(problem.evaluation) == 3
        assert set(problem.public) < set(problem.evaluation)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("It is 3.", "holds no code block"),
        ("```python\nprint(1)", "code block is not closed"),
        ("```python\n\n```", "code block is empty"),
    ],
)
def test_errors_of_form_have_texts_of_their_own(environment, completion, text):
    verdict = asyncio.run(environment.judge(task(environment, "Add"), completion))
    assert verdict.reward == 0.0
    assert text in verdict.feedback


def test_the_last_block_counts():
    assert read_code("```python\na\n```\nor rather\n```py\nb\n```")[0] == "b\n"


def test_many_are_judged_at_once_and_in_their_order(environment):
    chosen = task(environment, "Add")
    programs = [f"def add(a, b):\n    return a + b + {i % 2}" for i in range(20)]
    verdicts = judge_all(environment, [(chosen, f"```python\n{program}\n```") for program in programs])
    assert [v.reward for v in verdicts if isinstance(v, Verdict)] == [1.0, 0.0] * 10


def test_a_sandbox_that_fails_leaves_the_rollout_ungraded(environment, monkeypatch):
    def broken(*args, **kwargs):
        raise SandboxError("no more processes")

    monkeypatch.setattr("vpd.environments.code.run_tests", broken)
    (outcome,) = judge_all(environment, [(task(environment, "Add"), "```python\npass\n```")])
    assert isinstance(outcome, SandboxError)


def test_demonstrations_pass_and_their_attempts_fail(environment):
    demonstrations = environment.demonstrations(2)
    assert len(demonstrations) == 2
    for each in demonstrations:
        assert asyncio.run(environment.judge(each.task, each.completion)).reward == 1.0
        assert asyncio.run(environment.judge(each.task, each.attempt)).reward == 0.0


def live_code_bench(**changes):
    private = json.dumps([{"input": "7\n", "output": "14\n", "testtype": "stdin"}])
    return {
        "question_id": "abc",
        "question_content": "Print twice the number.",
        "starter_code": "",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(private))).decode(),
        "metadata": "{}",
        **changes,
    }


def test_live_code_bench_is_read(tmp_path):
    function = live_code_bench(
        question_id="def",
        question_content="Sort the list.",
        starter_code="class Solution:\n    def order(self, values: List[int]) -> List[int]:\n        ",
        public_test_cases=json.dumps([{"input": "[2, 1]", "output": "[1, 2]", "testtype": "functional"}]),
        private_test_cases=json.dumps([{"input": "[3, 1]", "output": "[1, 3]", "testtype": "functional"}]),
        metadata=json.dumps({"func_name": "order"}),
    )
    third = live_code_bench(question_id="ghi", question_content="Print it, twice.")
    path = tmp_path / "live.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (live_code_bench(), function, third)))
    with Code(str(path), selection_size=1, final_size=1) as environment:
        tasks = {t.id: (split, t) for split in ("train", "selection", "final") for t in environment.tasks(split)}
        assert set(tasks) == {"abc", "def", "ghi"}
        programs = {
            "abc": "print(2 * int(input()))",
            "def": (
                "class Solution:\n    def order(self, values: List[int]) -> List[int]:\n"
                "        return tuple(sorted(values))\n\nif __name__ == '__main__':\n    input()"
            ),
            "ghi": "print(2 * int(input()))",
        }
        for name, (_, each) in tasks.items():
            assert judged(environment, each, programs[name]).reward == 1.0
            assert judged(environment, each, "class Solution:\n    pass").reward == 0.0


class Harmful:
    def __reduce__(self):
        return (print, ("run while reading",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "line 2: there are no tests"),
        ({"tests": [{"input": "", "output": ""}]}, "line 2: the column 'prompt' is missing"),
        ({"prompt": "x", "function": "f", "tests": [{"input": "1"}]}, "line 2: the column 'arguments' is missing"),
        (live_code_bench(public_test_cases="["), "line 2"),
        (
            live_code_bench(private_test_cases=base64.b64encode(zlib.compress(pickle.dumps(Harmful()))).decode()),
            "private tests cannot be read: they refer to builtins.print",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_told_with_their_line(tmp_path, row, message, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(DOUBLE) + "\n" + json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        Code(str(path), final_size=1)
    assert capsys.readouterr().out == ""


def test_the_data_section_makes_it(folder):
    limits = {"seconds": 2, "threads": 3, "packages": []}
    environment = make_environment(
        CodeData.model_validate({"path": str(folder), "selection_size": 1, "limits": limits})
    )
    assert isinstance(environment, Code)
    assert environment._limits == Limits(seconds=2, threads=3, packages=())
    environment.close()


def test_the_defaults_of_the_settings_are_those_of_the_sandbox():
    settings = CodeLimits().model_dump(exclude={"packages"})
    assert Limits(**settings) == Limits()


def test_packages_that_are_missing_are_refused(folder):
    with pytest.raises(ConfigError, match='"no_such_package", which is not installed'):
        Code(str(folder), limits=Limits(packages=("no_such_package",)))


def test_compressed_tests_have_a_size_limit(tmp_path):
    bomb = zlib.compress(b"0" * (257 * 2**20), 9)
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(live_code_bench(private_test_cases=base64.b64encode(bomb).decode())))
    with pytest.raises(ConfigError, match="256 MB"):
        Code(str(path), final_size=1)


def test_output_may_be_as_large_as_the_expected_one(tmp_path):
    text = "0123456789\n" * 2000
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"Print {n}.", "tests": [{"input": "", "output": text}]} for n in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with Code(str(path), limits=Limits(output_kb=1), selection_size=1, final_size=1) as environment:
        (task,) = environment.tasks("train")
        verdict = asyncio.run(environment.judge(task, f"```python\nprint({text!r})\n```"))
        assert verdict.reward == 1.0
        verdict = asyncio.run(environment.judge(task, "```python\nprint('x' * 10**6)\n```"))
        assert "too much output" in verdict.feedback


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3", "1 2 \n3\n\n", True),
        ("1.50", "1.5", True),
        ("1\n\n2", "1\n2", False),
        ("1 2", "12", False),
        ("yes", "YES", False),
        ("nan", "nan", True),
        ("1e1", "10", True),
        ("1_000", "1000", False),
        ("a\x0cb", "a\nb", False),
    ],
)
def test_outputs_are_compared_line_by_line(actual, expected, same):
    assert same_output(actual, expected) is same


def test_long_values_are_shortened_in_the_middle():
    text = shortened("a" * 500 + "b" * 500, 100)
    assert len(text) <= 100
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert shortened("short") == "short"


def test_the_training_problems_can_be_evaluated_by_their_private_tests(folder):
    with Code(str(folder), final="training", selection_size=1, limits=Limits(memory_mb=256)) as environment:
        assert len(environment.tasks("final")) == len(environment.tasks("train"))
        training, final = task(environment, "Add"), task(environment, "Add", "final")
        assert training.prompt == final.prompt
        memorised = "def add(a, b):\n    return {(1, 2): 3, (10**9, 5): 10**9 + 5}.get((a, b))"
        assert judged(environment, training, memorised).reward == 1
        assert judged(environment, final, memorised).reward == 0
        assert "Call:" not in (judged(environment, final, memorised).feedback or "")
