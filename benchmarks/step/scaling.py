"""Measure how the cost of our step grows with N, the completions' length, the vocabulary and the network.

    python -m benchmarks.step.scaling --output scaling.json

The networks have SmolLM2's shapes and random weights. The slope of each column is that of a straight line through the
logarithms; a slope of 1 means cost in proportion. Completion lengths are timed with prefix sharing and without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.step.results import SideResult
from benchmarks.step.specs import Side, Workload
from benchmarks.step.turns import console, take_turns

BASE = Workload(prompt_tokens=150, completion_tokens=16, num_generations=4, prompts=2)
SIDE = Side("ours", "sdpo", "random-135m")
UNSHARED = replace(SIDE, share_prefixes=False)
LENGTHS = (4, 16, 64, 256, 1024)

SWEEPS: dict[str, list[tuple[int | None, Side, Workload]]] = {
    "N": [(count, SIDE, replace(BASE, num_generations=count)) for count in (2, 4, 8, 16)],
    "completion tokens": [(length, SIDE, replace(BASE, completion_tokens=length)) for length in LENGTHS],
    "completion tokens, unshared": [(length, UNSHARED, replace(BASE, completion_tokens=length)) for length in LENGTHS],
    "vocabulary": [(size, replace(SIDE, model=f"random-135m-{size}"), BASE) for size in (49152, 151936)],
    "parameters": [(None, replace(SIDE, model=f"random-{size}"), BASE) for size in ("tiny", "135m", "360m")],
}
"""The points of each sweep: the varied value (None stands for the number of parameters), the side and the workload."""


def columns(result: SideResult) -> dict[str, float]:
    """Return the columns of one point."""
    phases = result.phases()
    return {
        "s/step": result.seconds,
        "rollout s": phases["rollout"],
        "update s": phases["m_step"],
        "tokens computed": result.median(lambda record: record.tokens_computed),
        "working GiB": result.working_bytes / 2**30,
    }


def slope(values: Sequence[float], costs: Sequence[float]) -> float:
    """Return the least-squares slope of log cost against log value; nan where a cost is not positive."""
    if min(costs) <= 0:
        return math.nan
    xs, ys = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return products / sum((x - x_mean) ** 2 for x in xs)


def measure(name: str, warm_up: int, steps: int, threads: int) -> dict[str, Any]:
    """Time the points of one sweep and print its table; the last row holds the slopes."""
    values, results = [], []
    for value, side, workload in SWEEPS[name]:
        (result,) = take_turns([replace(side, threads=threads)], workload, warm_up, steps)
        values.append(value or result.info.parameters)
        results.append(result)
    points = [columns(result) for result in results]
    slopes = {column: slope(values, [point[column] for point in points]) for column in points[0]}
    table = Table(name, *slopes, title=f"{name}; otherwise {BASE}", title_justify="left")
    for value, point in zip(values, points, strict=True):
        table.add_row(str(value), *(f"{cost:.4g}" for cost in point.values()))
    table.add_section()
    table.add_row("slope", *(f"{cost:.2f}" for cost in slopes.values()))
    console.print(table)
    sides = [{"value": value, **result.as_json()} for value, result in zip(values, results, strict=True)]
    return {"slopes": slopes, "points": sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--steps", type=int, default=3, help="the counted steps of each point")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="a JSON file for everything that was measured")
    options = parser.parse_args()
    measured: dict[str, Any] = {"base": asdict(BASE), "sweeps": {}}
    for name in options.sweep:
        measured["sweeps"][name] = measure(name, options.warm_up, options.steps, options.threads)
        if options.output:
            options.output.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
