"""A run's folder and what is told while it is filled: metrics, samples, checkpoints, progress."""

from vpd.runs.files import RunError, atomic_write_bytes, atomic_write_text
from vpd.runs.folder import RunFolder, read_metrics
from vpd.runs.machine import peak_memory_bytes
from vpd.runs.progress import Progress
from vpd.runs.samples import RolloutRecord, read_rollouts, write_rollouts

__all__ = [
    "Progress",
    "RolloutRecord",
    "RunError",
    "RunFolder",
    "atomic_write_bytes",
    "atomic_write_text",
    "peak_memory_bytes",
    "read_metrics",
    "read_rollouts",
    "write_rollouts",
]
