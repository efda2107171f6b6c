"""The results of timed steps: medians, spreads and ratios, as tables and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from benchmarks.step.specs import Side, SideInfo, StepRecord

E_STEP_EVERY = 5
"""The F for which the E-step's overhead is reported."""


@dataclass
class SideResult:
    """A side with its counted steps, without the warm-up."""

    side: Side
    info: SideInfo
    steps: list[StepRecord] = field(default_factory=list)

    def median(self, value: Callable[[StepRecord], float]) -> float:
        return statistics.median(map(value, self.steps))

    @property
    def seconds(self) -> float:
        """The median time of a step, without its E-step where one ran."""
        return self.median(_plain_seconds)

    @property
    def e_steps(self) -> list[float]:
        """The seconds of each E-step that really ran."""
        return [record.phases.get("e_step", 0.0) for record in self.steps if record.e_step]

    @property
    def e_step_overhead(self) -> float | None:
        """The time that E-steps add to the average step at F = 5, as a share of the step without them."""
        return statistics.median(self.e_steps) / E_STEP_EVERY / self.seconds if self.e_steps else None

    @property
    def peak_bytes(self) -> int:
        return max(record.peak_bytes for record in self.steps)

    @property
    def working_bytes(self) -> int:
        """The memory of activations, logits and copies.

        It is the peak minus the idle process, the weights, the gradients and the optimizer's state.
        """
        return self.peak_bytes - self.info.idle_bytes - self.info.static_bytes

    def phases(self) -> dict[str, float]:
        """Return the median seconds of each phase; the E-step's median is over the steps that had one."""
        names = dict.fromkeys(name for record in self.steps for name in record.phases)
        found = {name: [record.phases[name] for record in self.steps if name in record.phases] for name in names}
        return {name: statistics.median(seconds) for name, seconds in found.items()}

    def as_json(self) -> dict[str, Any]:
        seconds = [_plain_seconds(record) for record in self.steps]
        return {
            "label": self.side.label,
            "side": asdict(self.side),
            "info": asdict(self.info),
            "seconds": {"median": self.seconds, "min": min(seconds), "max": max(seconds)},
            "phases": self.phases(),
            "peak_bytes": self.peak_bytes,
            "working_bytes": self.working_bytes,
            "e_steps": len(self.e_steps),
            "e_step_overhead": self.e_step_overhead,
            "steps": [asdict(record) for record in self.steps],
        }


def _plain_seconds(record: StepRecord) -> float:
    return record.seconds - record.phases.get("e_step", 0.0)


def comparison(title: str, results: Sequence[SideResult]) -> Table:
    """Make a table with one row for each side; the ratios are relative to the first."""
    table = Table(title=title, title_justify="left")
    columns = ("side", "s/step (min..max)", "ratio", "peak GiB", "working GiB", "computed", "needed", "divergence")
    for name in columns:
        table.add_column(name, justify="left" if name == "side" else "right", no_wrap=name != "side")
    for result in results:
        seconds = [_plain_seconds(record) for record in result.steps]
        divergences = [record.divergence for record in result.steps if record.divergence is not None]
        needed = result.median(lambda r: r.tokens_needed), result.median(lambda r: r.tokens_needed_jointly)
        table.add_row(
            result.side.label,
            f"{result.seconds:.2f} ({min(seconds):.2f}..{max(seconds):.2f})",
            f"{result.seconds / results[0].seconds:.2f}",
            f"{result.peak_bytes / 2**30:.2f}",
            f"{result.working_bytes / 2**30:.2f}",
            f"{result.median(lambda r: r.tokens_computed):.0f}",
            f"{needed[0]:.0f} ({needed[1]:.0f})",
            f"{statistics.fmean(divergences):.3f}" if divergences else "",
        )
    return table


def phase_lines(results: Sequence[SideResult]) -> list[str]:
    """Return lines with the medians of each side's phases, and with the time that E-steps add."""
    lines = []
    for result in results:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in result.phases().items())
        sampled = result.median(lambda r: r.tokens_sampled / r.phases["rollout"])
        lines.append(f"{result.side.label}: {phases} s; {sampled:.0f} tokens/s sampled")
        if result.e_step_overhead is not None:
            lines.append(
                f"  E-steps that ran: {len(result.e_steps)}, {statistics.median(result.e_steps):.2f} s each; at F = "
                f"{E_STEP_EVERY} they add {result.e_step_overhead:.0%} to the average step"
            )
    return lines
