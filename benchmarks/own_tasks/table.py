"""``python -m benchmarks.own_tasks.table DIR``: what came out, as Markdown.

Accuracies are means over seeds on the same final questions. Differences have 95% intervals over seeds and questions.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from vpd.evaluation.intervals import crossed_interval

Results = dict[str, dict[str, dict[int, dict[str, Any]]]]


def read(folder: Path) -> Results:
    """Read all results: by task, method and seed."""
    results: Results = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        results[found["task"]][found["method"]][found["seed"]] = found
    return results


def difference(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    """Return the mean difference in points, with its interval, over the seeds that both have.

    The start has one seed, which stands against all.
    """
    seeds = [seed for seed in runs if seed in others or len(others) == 1]
    rows = []
    for seed in seeds:
        own, other = runs[seed]["outcomes"], others.get(seed, next(iter(others.values())))["outcomes"]
        rows.append([own[name] - other[name] for name in sorted(own)])
    mean = fmean(value for row in rows for value in row)
    low, high = crossed_interval(rows)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def lowest(runs: dict[int, dict[str, Any]]) -> float:
    """Return how far the accuracy on the selection split ever was below the start, in points, in the worst run."""
    return min(100 * (accuracy - run["selection"][0][1]) for run in runs.values() for _, accuracy in run["selection"])


def table(results: Results) -> str:
    """Write one row for each task and method."""
    lines = [
        "| task | method | seeds | accuracy | against the start | against GRPO | lowest on the selection split |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, methods in results.items():
        if "start" not in methods:
            continue
        start = methods["start"]
        lines.append(f"| {task} | start | | {100 * start[0]['accuracy']:.1f}% | | | |")
        for method in sorted(set(methods) - {"start"}):
            runs = methods[method]
            accuracy = fmean(run["accuracy"] for run in runs.values())
            against = difference(runs, methods["grpo"]) if method != "grpo" and methods["grpo"] else ""
            lines.append(
                f"| | {method} | {len(runs)} | {100 * accuracy:.1f}% | {difference(runs, start)} | {against} | "
                f"{lowest(runs):+.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
