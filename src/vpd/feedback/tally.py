"""What feedback sources count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tally:
    """Running totals of a feedback source, or the difference of two of them.

    Attributes:
        counts: Numbers by the name of their metric. They are summed over processes, so that every process must give
            the same names.
        seconds: Wall-clock seconds by phase.
        token_count: How many tokens the trained network has sampled.
    """

    counts: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    token_count: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            _sums(self.counts, other.counts), _sums(self.seconds, other.seconds), self.token_count + other.token_count
        )

    def __sub__(self, other: Tally) -> Tally:
        negative = Tally(_negated(other.counts), _negated(other.seconds), -other.token_count)
        return self + negative


def _sums(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    return {name: left.get(name, 0.0) + right.get(name, 0.0) for name in {**left, **right}}


def _negated(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: -number for name, number in numbers.items()}
