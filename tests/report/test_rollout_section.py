import re
from dataclasses import replace
from typing import Any

from vpd.report.rollout_section import rollout_section
from vpd.report.run_data import RunData
from vpd.runs import RolloutRecord, TurnRecord


def section(tokens: int, **changes: Any) -> str:
    turn = TurnRecord(
        [2], "c", [1] * tokens, [-1.0] * tokens, True,
        student_log_probs=[-1.0] * tokens,
        teacher_log_probs=[-0.5] + [-2.0] * (tokens - 1),
        divergence=[0.1] * (tokens - 1) + [0.4],
    )  # fmt: skip
    return page_of([replace(turn, **changes)])


def page_of(turns: list[TurnRecord]) -> str:
    record = RolloutRecord(3, 0, "t", "p", turns, 0.5, None, None)
    return rollout_section(RunData("run", {"algorithm": {"success_threshold": 0.5}}, [], None, [record])) or ""


def bars(page: str, kind: str) -> int:
    return sum(path.count("M") for path in re.findall(f'class="{kind}" d="([^"]*)"', page))


def test_each_token_has_a_bar_coloured_by_what_the_teacher_thinks():
    page = section(10)
    assert (bars(page, "more"), bars(page, "less")) == (1, 9)
    assert "Divergence by token (highest 0.4 nats)" in page
    assert "reward 0.5" in page
    assert "success" in page
    assert "cut at the length limit" in page


def test_a_long_completion_keeps_its_highest_bar():
    page = section(8193)
    assert bars(page, "more") + bars(page, "less") <= 400
    assert page.count("v-40.0") == 1


def test_without_a_divergence_the_log_ratio_is_shown_and_without_numbers_nothing():
    assert "Log-ratio of teacher and student by token (highest 1 nats)" in section(4, divergence=None)
    assert "<svg" not in section(4, teacher_log_probs=None)
    assert "<svg" not in section(4, student_log_probs=[-1.0])
    assert "highest 0 nats" in section(4, divergence=[0.0] * 4)


def test_the_turns_of_a_conversation_are_numbered():
    first = TurnRecord([2], "Which one?", [1], [-1.0], False, "teacher's first prompt")
    second = TurnRecord([2], "This one.", [1, 2], [-1.0, -1.0], False)
    page = page_of([first, second])
    for text in ("Completion of turn 1", "Which one?", "Completion of turn 2", "This one.", "3 tokens"):
        assert text in page
    assert page.count("prompt of turn") == 1
    assert "of turn" not in page_of([first])
