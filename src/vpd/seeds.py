"""Seeds of a run's parts, from the run's own."""

from __future__ import annotations

import json
import random


def mix(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine and in every process."""
    return random.Random(json.dumps(numbers)).getrandbits(31)
