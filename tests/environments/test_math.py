"""Boxed answers are compared as mathematics, in processes that can be ended."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vpd import ConfigError
from vpd.config import MathData
from vpd.environments import Math, judge_all, make_environment
from vpd.environments.math import NAMED
from vpd.environments.math_answers import compare, last_boxed
from vpd.environments.processes import JudgeOutOfTimeError, JudgeProcessError, JudgeProcesses
from vpd.types import Verdict

pytest.importorskip("math_verify", reason="math-verify is not installed")

ROWS = [
    {"problem": "What is a half and a quarter?", "answer": "\\frac{3}{4}"},
    {"problem": "What are the roots of $x^2 = 4$?", "answer": "x = 2, -2"},
    {"problem": "How many?", "answer": 12},
    {"problem": "How many more?", "answer": "\\boxed{1{,}200}"},
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    path = tmp_path_factory.mktemp("math") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return Math(str(path), selection_size=1, final_size=1)


def judged(environment, problem: str, completion: str) -> Verdict:
    tasks = [task for split in ("train", "selection", "final") for task in environment.tasks(split)]
    (chosen,) = [task for task in tasks if task.prompt[0]["content"].startswith(problem)]
    return asyncio.run(environment.judge(chosen, completion))


@pytest.mark.parametrize(
    ("problem", "completion", "reward", "text"),
    [
        ("What is a half", "So it is \\boxed{0.75}.", 1.0, 'Your answer, "0.75", was compared and is right.'),
        ("What is a half", "\\boxed{\\dfrac{6}{8}}", 1.0, "is right"),
        ("What is a half", "\\boxed{1} or rather \\boxed{3/4}", 1.0, "is right"),
        ("What is a half", "\\boxed{2/3}", 0.0, 'Your answer, "2/3", was compared and is wrong.'),
        ("What are the roots", "\\boxed{\\{-2, 2\\}}", 1.0, "is right"),
        ("How many?", "\\boxed{12}", 1.0, "is right"),
        ("How many more", "\\boxed{1200}", 1.0, "is right"),
        ("How many?", "It is 12.", 0.0, "could not be read: it has no \\boxed{...}."),
        ("How many?", "\\boxed{}", 0.0, "could not be read: nothing stands in \\boxed{}."),
        ("How many?", "\\boxed{12", 0.0, "it has no \\boxed{...}"),
    ],
)
def test_answers_are_compared_as_mathematics(environment, problem, completion, reward, text):
    verdict = judged(environment, problem, completion)
    assert verdict.reward == reward
    assert text in (verdict.feedback or "")


def test_a_comparison_that_hangs_fails_the_completion_and_the_next_is_right(environment, monkeypatch):
    monkeypatch.setattr("vpd.environments.math._COMPARE", "time:sleep")
    monkeypatch.setattr(environment._processes, "_seconds", 0.5)
    chosen = environment.tasks("train")[0]
    monkeypatch.setattr(
        environment._processes,
        "call",
        lambda function, *arguments: JudgeProcesses.call(environment._processes, function, 60),
    )
    verdict = asyncio.run(environment.judge(chosen, "\\boxed{1}"))
    assert verdict.reward == 0.0
    assert "could not be compared in time" in verdict.feedback
    monkeypatch.undo()
    assert judged(environment, "How many?", "\\boxed{12}").reward == 1.0


def test_many_are_judged_in_their_order(environment):
    chosen = next(
        t for split in ("train", "selection", "final") for t in environment.tasks(split) if t.reference == "12"
    )
    outcomes = judge_all(environment, [(chosen, f"\\boxed{{{n}}}") for n in (12, 13, 12, 14)])
    assert [o.reward for o in outcomes if isinstance(o, Verdict)] == [1.0, 0.0, 1.0, 0.0]


def test_the_right_answer_is_told_only_where_configured(environment, tmp_path):
    assert "0.75" not in judged(environment, "How many?", "\\boxed{3}").feedback
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    telling = make_environment(MathData(path=str(path), selection_size=1, final_size=1, feedback="reference"))
    assert isinstance(telling, Math)
    assert judged(telling, "How many?", "\\boxed{3}").feedback.endswith("The right answer is 12.")


def test_demonstrations_pass_and_attempts_fail(environment):
    for each in environment.demonstrations(2):
        assert asyncio.run(environment.judge(each.task, each.completion)).reward == 1.0
        assert asyncio.run(environment.judge(each.task, each.attempt)).reward == 0.0


def test_named_sets_are_loaded_with_their_columns_and_another_may_be_final(monkeypatch):
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        (source,) = [source for source in NAMED.values() if source.path == path]
        rows = [{source.problem: f"{path} {i}", source.answer: str(i)} for i in range(5)]
        return {"train" if path.startswith("open-r1") else "test": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    environment = Math("dapo-math", final_path="math-500", selection_size=2)
    assert asked == [("open-r1/DAPO-Math-17k-Processed", "en"), ("HuggingFaceH4/MATH-500", None)]
    assert [len(environment.tasks(split)) for split in ("train", "selection", "final")] == [3, 2, 5]
    for name in NAMED:
        assert len(Math(name, final_size=1, selection_size=1).tasks("train")) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": " ", "answer": "1"}, "line 1: the column 'problem' must be a text"),
        ({"problem": "x"}, "line 1: the column 'answer' must be a text or a number, got None"),
    ],
)
def test_rows_that_cannot_be_read_are_told_with_their_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        Math(str(path), final_size=1)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{\\frac{1}{2}} and \\boxed{\\sqrt{2}}", "\\sqrt{2}"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("none", None),
        ("\\boxed{", None),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{a \\boxed{b} c}", "b"),
        ("\\boxed {3}}", "3"),
        ("\\\\boxed{3}", "3"),
    ],
)
def test_the_last_complete_box_counts(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("answer", "reference", "outcome"),
    [
        ("5.", "5", "right"),
        ("5.0.", "5", "right"),
        ("\\frac{1}{2};", "0.5", "right"),
        ("5\\,", "5", "right"),
        ("$5.$", "5", "right"),
        ("1.", "2", "wrong"),
        ("0.3...", "0.3", "wrong"),
        ("**5**", "5", "right"),
        ("**5**", "6", "wrong"),
        ("\\boldsymbol{\\frac12}", "0.5", "right"),
        ("\\textbf{yes}", "\\text{Yes}", "right"),
        ("\\mathbf{7}", "7", "right"),
        ("1e5", "100000", "right"),
        ("1.5e-3", "0.0015", "right"),
        ("-1.5E+3", "-1500", "right"),
        ("1e5", "1e4", "wrong"),
        ("2e", "2e", "right"),
        ("3e^2", "3e^{2}", "right"),
        ("1011_2", "1011_{2}", "right"),
        ("01011_{\\text{two}}", "1011_2", "right"),
        ("1011_3", "1011_2", "wrong"),
        ("1011", "1011_2", "right"),
        ("1011_2", "1011", "right"),
        ("1011_2", "11", "right"),
        ("1011_2", "12", "wrong"),
        ("11", "1011_2", "wrong"),
        ("A3_{16}", "a3_{16}", "right"),
        ("A4_{16}", "a3_{16}", "wrong"),
        ("a_2", "a_2", "right"),
        ("10000000!", "10000000!", "right"),
        ("10000000!", "5", "too large"),
        ("5", "10000000!", "too large"),
        ("10!", "3628800", "right"),
        ("+1" * 2000, "5", "too long"),
        (".", "5", "unreadable"),
    ],
)
def test_answers_that_math_verify_misreads_are_compared_rightly(answer, reference, outcome):
    assert compare(answer, reference) == outcome


def test_judges_processes_end_with_a_trainer_that_is_killed():
    script = """
import asyncio
from vpd.environments.processes import JudgeProcesses
processes = JudgeProcesses(seconds=600, workers=1)
print(asyncio.run(processes.call("os:getpid")), flush=True)
asyncio.run(processes.call("time:sleep", 600))
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    judge = Path("/proc") / trainer.stdout.readline().strip()
    time.sleep(0.5)
    assert judge.exists()
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10
    while _runs(judge) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(judge)


def test_a_judges_process_outlives_the_thread_of_its_first_call():
    processes = JudgeProcesses(seconds=5, workers=1)
    numbers = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: numbers.append(asyncio.run(processes.call("os:getpid"))))
        thread.start()
        thread.join()
        time.sleep(0.2)
    assert numbers[0] == numbers[1]


def _runs(process: Path) -> bool:
    try:
        # Behind the command's name in brackets comes the state; a zombie has ended and waits for whoever inherits it.
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_judges_process_that_dies_or_raises_is_told_and_the_next_call_works():
    processes = JudgeProcesses(seconds=5, workers=1)
    assert asyncio.run(processes.call("math:gcd", 12, 18)) == 6
    with pytest.raises(JudgeProcessError, match="TypeError"):
        asyncio.run(processes.call("math:gcd", "x"))
    with pytest.raises(JudgeProcessError, match="ended with code 3"):
        asyncio.run(processes.call("os:_exit", 3))
    assert asyncio.run(processes.call("math:gcd", 12, 18)) == 6


def test_a_call_that_takes_too_long_is_ended_in_time():
    processes = JudgeProcesses(seconds=0.5, workers=1)
    asyncio.run(processes.call("math:gcd", 1, 1))
    start = time.monotonic()
    with pytest.raises(JudgeOutOfTimeError):
        asyncio.run(processes.call("time:sleep", 60))
    assert time.monotonic() - start < 5


def test_what_a_judge_prints_is_no_answer():
    assert asyncio.run(JudgeProcesses(seconds=5, workers=1).call("builtins:print", '{"value": 3}')) is None
