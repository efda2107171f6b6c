"""The sides take turns, so that other work on the machine slows all of them down alike."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from benchmarks.step.results import SideResult
from benchmarks.step.specs import Side, Workload
from benchmarks.step.workers import running

console = Console(width=140, highlight=False)


def take_turns(sides: Sequence[Side], workload: Workload, warm_up: int, steps: int) -> list[SideResult]:
    """Let all sides step in turn; the first ``warm_up`` rounds do not count."""
    with running(sides, workload) as workers:
        results = [SideResult(worker.side, worker.info) for worker in workers]
        for turn in range(warm_up + steps):
            pairs = list(zip(workers, results, strict=True))
            for worker, result in pairs if turn % 2 == 0 else reversed(pairs):
                record = worker.step()
                kind = "counted" if turn >= warm_up else "warm-up"
                console.print(f"  {kind} {record.seconds:8.2f} s  {worker.side.label}", style="dim")
                if turn >= warm_up:
                    result.steps.append(record)
        return results
