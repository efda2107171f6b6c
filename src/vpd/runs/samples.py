"""Writes the sampled rollouts of a step as one parquet file, for people and for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from vpd.runs.files import RunError, atomic_write_bytes
from vpd.types import Messages, Rollout, TeacherView, Verdict

_NUMBERS = pa.list_(pa.float32())

_TURN = pa.struct(
    [
        pa.field("prompt_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("log_probs", _NUMBERS, nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("teacher_prompt", pa.string()),
        pa.field("student_log_probs", _NUMBERS),
        pa.field("teacher_log_probs", _NUMBERS),
        pa.field("divergence", _NUMBERS),
    ]
)

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("turns", pa.list_(_TURN), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("details", pa.string(), nullable=False),
        pa.field("success", pa.bool_()),
        pa.field("feedback", pa.string()),
        pa.field("source", pa.string()),
        pa.field("author", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """One completion of a rollout, with the teacher's prompt and the M-step's numbers for it.

    Attributes:
        prompt_ids: The student's prompt as token ids.
        completion: The decoded completion.
        completion_ids: The completion's token ids [T].
        log_probs: The tokens' log-probabilities from the rollout engine [T].
        truncated: Whether the length limit ended the completion.
        teacher_prompt: The teacher's prompt as text; None where the turn has no teacher.
        student_log_probs, teacher_log_probs: The tokens' log-probabilities from the M-step [T]; None without one.
        divergence: The tokens' divergences from the M-step [T]; None without one.
    """

    prompt_ids: Sequence[int]
    completion: str
    completion_ids: Sequence[int]
    log_probs: Sequence[float]
    truncated: bool
    teacher_prompt: str | None = None
    student_log_probs: Sequence[float] | None = None
    teacher_log_probs: Sequence[float] | None = None
    divergence: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One row of the file: a rollout with its turns and its verdict.

    Attributes:
        step: The number of the rollout batch, counted from 1.
        group: The index of the prompt within the batch.
        task_id: The task's id.
        prompt: The task's prompt as text.
        turns: The completions with what belongs to them.
        reward: The reward; None where the judge itself failed.
        rewards: Each reward function's own reward by name, None where it gave none; empty for other judges.
        details: What else the judge noted, as a JSON object.
        success: Whether the rollout has succeeded; None where that was not told.
        feedback: The environment's text on the completion; None where it gave none.
        source: The kind of feedback that the teacher read; None where the rollout was left out.
        author: Who wrote the completion: ``student``, or ``teacher`` for a second attempt, after the teacher had read
            the feedback on a rollout of the same group.
    """

    step: int
    group: int
    task_id: str
    prompt: str
    turns: Sequence[TurnRecord]
    reward: float | None
    feedback: str | None
    source: str | None
    author: Literal["student", "teacher"] = "student"
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    details: str = "{}"
    success: bool | None = None

    @classmethod
    def from_rollout(
        cls,
        step: int,
        rollout: Rollout,
        view: TeacherView | None = None,
        *,
        author: Literal["student", "teacher"] = "student",
        is_success: bool | None = None,
        student_log_probs: Sequence[float] | None = None,
        teacher_log_probs: Sequence[float] | None = None,
        divergence: Sequence[float] | None = None,
    ) -> RolloutRecord:
        """Make the row of a rollout.

        Args:
            step: The number of the rollout batch, counted from 1.
            rollout: The rollout.
            view: The teacher's prompts; None where the rollout has no feedback.
            author: Who wrote the completion.
            is_success: Whether the rollout has succeeded.
            student_log_probs, teacher_log_probs, divergence: The M-step's numbers for the completion tokens of the
                turns that it worked on, one turn after another.
        """
        prompts = [None] * len(rollout.turns) if view is None else view.turns
        numbers = {
            "student_log_probs": student_log_probs,
            "teacher_log_probs": teacher_log_probs,
            "divergence": divergence,
        }
        turns, start = [], 0
        for turn, prompt in zip(rollout.turns, prompts, strict=True):
            # Without any view the teacher reads the task alone, and has numbers for every turn.
            has_numbers = prompt is not None or view is None
            stop = start + (len(turn.completion_ids) if has_numbers else 0)
            turns.append(
                TurnRecord(
                    turn.prompt_ids,
                    turn.text,
                    turn.completion_ids,
                    turn.log_probs,
                    turn.truncated,
                    None if prompt is None else prompt.text,
                    **{
                        name: values[start:stop] if values is not None and has_numbers else None
                        for name, values in numbers.items()
                    },
                )
            )
            start = stop
        return cls(
            step=step,
            group=rollout.group,
            task_id=rollout.task.id,
            prompt=_as_text(rollout.task.prompt),
            turns=turns,
            reward=rollout.verdict.reward if rollout.verdict else None,
            feedback=rollout.verdict.feedback if rollout.verdict else None,
            source=view.source if view else None,
            author=author,
            rewards=_rewards_in(rollout.verdict),
            details=_details_in(rollout.verdict),
            success=is_success,
        )

    @property
    def completion(self) -> str:
        """The completions of all turns, as text."""
        return "\n\n".join(turn.completion for turn in self.turns)

    @property
    def token_count(self) -> int:
        """The number of completion tokens of all turns."""
        return sum(len(turn.completion_ids) for turn in self.turns)

    @property
    def truncated(self) -> bool:
        """Whether the length limit ended any of the turns."""
        return any(turn.truncated for turn in self.turns)


def write_rollouts(path: Path, records: Sequence[RolloutRecord]) -> None:
    """Write the rows in their order, atomically; equal rows give equal bytes."""
    rows = [_storable(asdict(record)) for record in records]
    buffer = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    atomic_write_bytes(path, buffer.getvalue().to_pybytes())


def read_rollouts(path: Path) -> list[RolloutRecord]:
    """Read the rows of one file, in their order.

    Raises:
        RunError: The file is damaged, or another version of vpd wrote it.
    """
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise RunError(
            f"{path} has no column {missing[0]}, so another version of vpd wrote it: read it with that version."
        )
    # A file's own description of its columns has no checksum.
    if not table.schema.equals(SCHEMA):
        raise RunError(
            f"{path} has other columns than a run writes: it is damaged, or another version of vpd wrote it."
        )
    rows = table.to_pylist()
    return [
        RolloutRecord(
            **{**row, "turns": [TurnRecord(**turn) for turn in row["turns"]], "rewards": dict(row["rewards"])}
        )
        for row in rows
    ]


def _rewards_in(verdict: Verdict | None) -> dict[str, float | None]:
    found = {} if verdict is None else verdict.details.get("rewards")
    return dict(found) if isinstance(found, Mapping) else {}


def _details_in(verdict: Verdict | None) -> str:
    found = {} if verdict is None else {key: value for key, value in verdict.details.items() if key != "rewards"}
    return json.dumps(found, ensure_ascii=False, default=str)


def _as_text(messages: Messages) -> str:
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"[{message.get('role')}]\n{message.get('content', '')}" for message in messages)


def _storable(value: Any) -> Any:
    """Replace what UTF-8 cannot hold: a judge may quote a program's undecodable output as lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="replace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item) for item in value]
    return value
