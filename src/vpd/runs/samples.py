"""Sampled rollouts of a step as one parquet file, for people and for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpd.runs.files import atomic_write_bytes
from vpd.types import Messages, Rollout, TeacherView

_NUMBERS = pa.list_(pa.float32())

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("log_probs", _NUMBERS, nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("feedback", pa.string()),
        pa.field("source", pa.string()),
        pa.field("teacher_prompt", pa.string()),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("student_log_probs", _NUMBERS),
        pa.field("teacher_log_probs", _NUMBERS),
        pa.field("divergence", _NUMBERS),
    ]
)


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One row: a rollout, what the judge said of it, and what the teacher read and thought.

    Attributes:
        step: rollout batch, from 1.
        group: index of the prompt within the batch.
        task_id: the task's id.
        prompt: the student's prompt as text.
        completion: the decoded completion.
        completion_ids: its T token ids.
        log_probs: T log-probabilities from the rollout engine.
        reward: None where the judge itself failed.
        feedback: the environment's text.
        source: kind of feedback the teacher read; None where the rollout was left out.
        teacher_prompt: the teacher's prompt as text.
        truncated: the length limit ended the completion.
        student_log_probs, teacher_log_probs: T log-probabilities from the M-step, where it handed them out.
        divergence: T divergences from the M-step.
    """

    step: int
    group: int
    task_id: str
    prompt: str
    completion: str
    completion_ids: Sequence[int]
    log_probs: Sequence[float]
    reward: float | None
    feedback: str | None
    source: str | None
    teacher_prompt: str | None
    truncated: bool
    student_log_probs: Sequence[float] | None = None
    teacher_log_probs: Sequence[float] | None = None
    divergence: Sequence[float] | None = None

    @classmethod
    def from_rollout(
        cls,
        step: int,
        rollout: Rollout,
        view: TeacherView | None = None,
        *,
        student_log_probs: Sequence[float] | None = None,
        teacher_log_probs: Sequence[float] | None = None,
        divergence: Sequence[float] | None = None,
    ) -> RolloutRecord:
        """The row of a rollout; ``view`` is None where the rollout has no feedback."""
        return cls(
            step=step,
            group=rollout.group,
            task_id=rollout.task.id,
            prompt=_as_text(rollout.task.prompt),
            completion=rollout.text,
            completion_ids=rollout.completion_ids,
            log_probs=rollout.log_probs,
            reward=rollout.verdict.reward if rollout.verdict else None,
            feedback=rollout.verdict.feedback if rollout.verdict else None,
            source=view.source if view else None,
            teacher_prompt=view.text if view else None,
            truncated=rollout.truncated,
            student_log_probs=student_log_probs,
            teacher_log_probs=teacher_log_probs,
            divergence=divergence,
        )


def write_rollouts(path: Path, records: Sequence[RolloutRecord]) -> None:
    """Write the rows in their order, atomically; equal rows give equal bytes."""
    rows = [{key: _storable(value) for key, value in asdict(record).items()} for record in records]
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    atomic_write_bytes(path, buffer.getvalue().to_pybytes())


def read_rollouts(path: Path) -> list[RolloutRecord]:
    """The rows of one file, in their order."""
    return [RolloutRecord(**row) for row in pq.ParquetFile(path).read().to_pylist()]


def _as_text(messages: Messages) -> str:
    if len(messages) == 1:
        return str(messages[0].get("content", ""))
    return "\n\n".join(f"[{message.get('role')}]\n{message.get('content', '')}" for message in messages)


def _storable(value: Any) -> Any:
    # A judge may quote a program's undecodable output as lone surrogates, which UTF-8 cannot hold.
    return value.encode("utf-8", errors="replace").decode("utf-8") if isinstance(value, str) else value
