"""The states of all random number generators of one process, as values that a checkpoint can keep."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from vpd.device import gpu_count


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, on the CPU and on all GPUs."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if gpu_count() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from states that :func:`random_states` gave; those of GPUs that are not there are left out."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: gpu_count()]):
        torch.cuda.set_rng_state(state, index)
