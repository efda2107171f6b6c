"""How much memory the run has taken at most."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU where there is one, else resident in main memory."""
    import torch  # here, since reading a run's folder needs no torch and loading it takes seconds

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
