import re
from dataclasses import replace
from typing import Any

from vpd.report.rollout_section import rollout_section
from vpd.report.run_data import RunData
from vpd.runs import RolloutRecord


def section(tokens: int, **changes: Any) -> str:
    record = RolloutRecord(
        3, 0, "t", "p", "c", [1] * tokens, [-1.0] * tokens, 0.5, None, None, None, True,
        student_log_probs=[-1.0] * tokens,
        teacher_log_probs=[-0.5] + [-2.0] * (tokens - 1),
        divergence=[0.1] * (tokens - 1) + [0.4],
    )  # fmt: skip
    run = RunData("run", {"algorithm": {"success_threshold": 0.5}}, [], None, [replace(record, **changes)])
    return rollout_section(run) or ""


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
