"""Holds the result that a run returns when it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vpd.config import VPDConfig
from vpd.runs.files import RunError
from vpd.runs.folder import RunFolder
from vpd.runs.json_files import is_as_written, read_json


class TrainOutput(NamedTuple):
    """The result of ``VPDTrainer.train``, in the form of transformers' ``TrainOutput``.

    Attributes:
        global_step: How many rollout batches the run has done, including those before a resume.
        training_loss: The mean of ``m_loss``, the M-step's loss, over these batches; nan where there was none.
        metrics: The other results: ``rows``, the final table, each row with ``name``, ``accuracy``, its 95% interval
            ``low`` and ``high``, and ``n`` questions; ``stopped_by``, the name of what ended the run before its time,
            or None; ``interrupted``, the number of the signal that did, or None; ``train_runtime``, the seconds of this
            call; ``train_seconds``, those of the rollout batches alone; ``train_steps_per_second``;
            ``skipped_e_steps``; and ``report``, the path of the page (None on other processes than the main one).
    """

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


def mean_loss(log_history: Sequence[Mapping[str, Any]]) -> float:
    """Average the ``m_loss`` of the logged entries; nan where none has one."""
    losses = [entry["m_loss"] for entry in log_history if entry.get("m_loss") is not None]
    return sum(losses) / len(losses) if losses else float("nan")


def finished_result(folder: RunFolder, args: VPDConfig, step: int) -> dict[str, Any] | None:
    """Return the contents of ``result.json`` where the run has nothing left to do with these settings, else None.

    Args:
        folder: The run's folder.
        args: The settings of the run that is to go on; with others than before it does go on.
        step: The step of the checkpoint that it would go on from.
    """
    try:
        result = read_json(folder.result_path)
    except RunError:
        return None
    if result is None or not is_as_written(result) or result["interrupted"] is not None or result["steps"] != step:
        return None
    limits = args.run
    out_of_time = limits.max_seconds is not None and result["train_seconds"] >= limits.max_seconds
    has_ended = step >= limits.max_steps or out_of_time or result["stopped_by"] is not None
    is_unchanged = not folder.changes_of(args.model_dump(mode="json"))
    return result if has_ended and is_unchanged and (folder.path / "model").is_dir() else None
