"""Tokens and seconds of a rollout batch."""

from __future__ import annotations

import time
from collections.abc import Mapping

from vpd.device import peak_memory_bytes
from vpd.policy.learner import Learner


class Throughput:
    """Measures one rollout batch, from when it is made on.

    Args:
        learner: Counts the tokens that training passes compute.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._start = time.perf_counter()
        self._before = learner.counts

    def metrics(self, sampled_tokens: int, phases: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the batch: tokens over all processes, seconds of each phase, and the process's peak memory.

        Args:
            sampled_tokens: How many tokens this process has sampled.
            phases: The seconds of each phase.
        """
        seconds = time.perf_counter() - self._start
        counts = self._learner.counts - self._before
        sampled, computed, padded = self._learner.total(sampled_tokens, counts.computed, counts.padded)
        rollout, training = phases.get("rollout", 0.0), phases.get("e_step", 0.0) + phases.get("m_step", 0.0)
        return {
            "tokens_rollout": sampled,
            "tokens_computed": computed,
            "tokens_padded": padded,
            "tokens_per_second_rollout": sampled / rollout if rollout else 0.0,
            "tokens_per_second_train": computed / training if training else 0.0,
            **{f"seconds_{phase}": value for phase, value in phases.items()},
            "seconds": seconds,
            "peak_memory_gb": peak_memory_bytes() / 2**30,
        }
