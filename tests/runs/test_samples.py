from dataclasses import replace

import pytest

from vpd.runs import RolloutRecord, read_rollouts, write_rollouts
from vpd.types import Rollout, Task, TeacherView, Verdict

ROLLOUT = Rollout(
    task=Task("sum-1", [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]),
    group=3,
    prompt_ids=[5, 6],
    completion_ids=[7, 8],
    log_probs=[-0.5, -1.5],
    truncated=False,
    text="2",
    verdict=Verdict(1.0, "Right."),
)


def test_rows_come_back_as_they_were(tmp_path):
    view = TeacherView([1, 2], "1+1? It is 2.", "sibling")
    full = RolloutRecord.from_rollout(
        4, ROLLOUT, view, student_log_probs=[-0.5, -1.5], teacher_log_probs=[-0.25, -1.0], divergence=[0.0, 0.125]
    )
    bare = RolloutRecord.from_rollout(4, replace(ROLLOUT, verdict=None))
    write_rollouts(tmp_path / "rows.parquet", [full, bare])
    assert read_rollouts(tmp_path / "rows.parquet") == [full, bare]
    assert full.prompt == "[system]\nAdd.\n\n[user]\n1+1?"
    assert (full.reward, full.feedback, full.source, full.teacher_prompt) == (1.0, "Right.", "sibling", "1+1? It is 2.")
    assert (bare.reward, bare.feedback, bare.source, bare.teacher_prompt) == (None, None, None, None)


def test_equal_rows_give_equal_bytes_and_none_give_a_file(tmp_path):
    record = RolloutRecord.from_rollout(1, ROLLOUT)
    for name in ("a", "b"):
        write_rollouts(tmp_path / name, [record] * 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_rollouts(tmp_path / "none", [])
    assert read_rollouts(tmp_path / "none") == []


@pytest.mark.parametrize("text", ["a\udcffb", "\0", "<script>", ""])
def test_any_text_can_be_stored(tmp_path, text):
    write_rollouts(tmp_path / "rows", [replace(RolloutRecord.from_rollout(1, ROLLOUT), feedback=text)])
    assert read_rollouts(tmp_path / "rows")[0].feedback == text.replace("\udcff", "?")
