"""What the run takes of its machine: memory at most, and the cores it may use."""

from __future__ import annotations

import os
import resource
import sys


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU where there is one, else resident in main memory."""
    import torch  # here, since reading a run's folder needs no torch and loading it takes seconds

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
