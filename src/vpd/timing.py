"""Times the phases of an iteration."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Timer:
    """Adds up wall-clock seconds by phase: ``with timer("rollout"): ...``.

    Attributes:
        seconds: The seconds of each phase so far; 0 for a phase that has not been timed.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
