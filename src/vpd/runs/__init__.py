"""Keeps the folder of a run: metrics, samples, checkpoints and best weights."""

from vpd.runs.files import RunError, atomic_write_bytes, atomic_write_text
from vpd.runs.folder import RunFolder, read_metrics
from vpd.runs.result import TrainOutput
from vpd.runs.samples import RolloutRecord, TurnRecord, read_rollouts, write_rollouts

__all__ = [
    "RolloutRecord",
    "RunError",
    "RunFolder",
    "TrainOutput",
    "TurnRecord",
    "atomic_write_bytes",
    "atomic_write_text",
    "read_metrics",
    "read_rollouts",
    "write_rollouts",
]
