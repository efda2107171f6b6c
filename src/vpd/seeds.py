"""Makes the seeds of a run's parts from the seed of the run."""

from __future__ import annotations

import json
import random


def mix(*numbers: int) -> int:
    """Make one seed from several numbers, the same on every machine and in every process."""
    return random.Random(json.dumps(numbers)).getrandbits(31)
