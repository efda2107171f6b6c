from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpd.runs import RolloutRecord, RunError, read_rollouts, write_rollouts
from vpd.types import Rollout, Task, TeacherPrompt, TeacherView, Turn, Verdict

ROLLOUT = Rollout(
    task=Task("sum-1", [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]),
    group=3,
    turns=[Turn(prompt_ids=[5, 6], completion_ids=[7, 8], log_probs=[-0.5, -1.5], truncated=False, text="2")],
    verdict=Verdict(1.0, "Right."),
)


def test_rows_come_back_as_they_were(tmp_path):
    view = TeacherView([TeacherPrompt([1, 2], "1+1? It is 2.")], "sibling")
    full = RolloutRecord.from_rollout(
        4, ROLLOUT, view, student_log_probs=[-0.5, -1.5], teacher_log_probs=[-0.25, -1.0], divergence=[0.0, 0.125]
    )
    bare = RolloutRecord.from_rollout(4, replace(ROLLOUT, verdict=None))
    write_rollouts(tmp_path / "rows.parquet", [full, bare])
    assert read_rollouts(tmp_path / "rows.parquet") == [full, bare]
    assert full.prompt == "[system]\nAdd.\n\n[user]\n1+1?"
    assert (full.reward, full.feedback, full.source) == (1.0, "Right.", "sibling")
    assert full.turns[0].teacher_prompt == "1+1? It is 2."
    assert full.turns[0].divergence == [0.0, 0.125]
    assert (bare.reward, bare.feedback, bare.source) == (None, None, None)
    assert bare.turns[0].teacher_prompt is None


def test_numbers_go_to_the_turns_that_have_a_teacher(tmp_path):
    turns = [Turn([1] * n, [7] * n, [-1.0] * n, n == 2, f"turn {n}") for n in (1, 2, 3)]
    conversation = replace(ROLLOUT, turns=turns)
    view = TeacherView([TeacherPrompt([4], "first"), None, TeacherPrompt([4], "third")], "environment")
    numbers = [0.5, 1.0, 2.0, 4.0]
    record = RolloutRecord.from_rollout(1, conversation, view, student_log_probs=numbers, divergence=numbers)
    write_rollouts(tmp_path / "rows", [record])
    (found,) = read_rollouts(tmp_path / "rows")
    assert found == record
    assert [turn.divergence for turn in found.turns] == [[0.5], None, [1.0, 2.0, 4.0]]
    assert [turn.teacher_log_probs for turn in found.turns] == [None, None, None]
    assert [turn.teacher_prompt for turn in found.turns] == ["first", None, "third"]
    assert (found.completion, found.token_count, found.truncated) == ("turn 1\n\nturn 2\n\nturn 3", 6, True)


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


def test_files_of_another_version_are_told_by_a_sentence(tmp_path):
    path = tmp_path / "step-000001.parquet"
    pq.write_table(pa.table({"step": [1], "completion": ["2"]}), path)
    with pytest.raises(RunError, match="has no column group, so another version of vpd wrote it"):
        read_rollouts(path)
