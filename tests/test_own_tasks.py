"""The suite of own tasks judges rightly, keeps its splits apart, and sets its results side by side."""

from __future__ import annotations

import pytest

from benchmarks.own_tasks.base import OwnTask
from benchmarks.own_tasks.table import lowest, table
from benchmarks.own_tasks.tasks import TASKS, value_of

MADE: dict[str, OwnTask] = {name: kind() for name, kind in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_get_the_reward_and_wrong_ones_do_not(name):
    environment = MADE[name]
    for task in environment.tasks("final")[:40]:
        data = dict(task.data)
        right, wrong = (
            environment.judge(task, environment.right(data)),
            environment.judge(task, environment.wrong(data)),
        )
        assert right.reward >= environment.success
        assert wrong.reward < environment.success, environment.wrong(data)
        assert right.feedback
        assert wrong.feedback
        assert right.feedback != wrong.feedback
        for odd in ("", "I do not know.", "[" * 5000, "1" * 5000):
            assert environment.judge(task, odd).reward < environment.success


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_always_the_same_and_stand_in_one_split(name):
    again, splits = TASKS[name](), ("train", "selection", "final")
    asked = [[task.prompt[0]["content"] for task in MADE[name].tasks(split)] for split in splits]
    assert asked == [[task.prompt[0]["content"] for task in again.tasks(split)] for split in splits]
    together = [question for of_split in asked for question in of_split]
    assert len(set(together)) == len(together)
    assert all(asked)


def test_expressions_hold_numbers_and_three_operators_alone():
    import ast

    assert value_of(ast.parse("2 * (3 + 4) - 1", mode="eval")) == 13
    for text in ("__import__('os')", "2 ** 9", "True", "a", "[1]"):
        with pytest.raises(ValueError, match="only whole numbers"):
            value_of(ast.parse(text, mode="eval"))


def result(accuracies, selection=((0, 0.5), (5, 0.4))):
    outcomes = {f"q{i}": float(value) for i, value in enumerate(accuracies)}
    return {"accuracy": sum(accuracies) / len(accuracies), "outcomes": outcomes, "selection": selection}


def test_the_table_compares_with_the_start_and_with_grpo():
    methods = {
        "start": {0: result([0, 0, 0, 0])},
        "grpo": {0: result([1, 0, 0, 0]), 1: result([1, 0, 0, 0])},
        "default": {0: result([1, 1, 0, 0]), 1: result([1, 1, 1, 0], selection=((0, 0.5), (5, 0.3)))},
    }
    text = table({"sums": methods})
    assert "| sums | start | | 0.0% |" in text
    (line,) = [line for line in text.splitlines() if "| default |" in line]
    assert "| 2 | 62.5% | +62.5 (" in line
    assert "| +37.5 (" in line
    assert lowest(methods["default"]) == pytest.approx(-20)
