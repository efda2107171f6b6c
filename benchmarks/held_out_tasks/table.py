"""The results of a folder of jobs as Markdown tables, with paired differences and 95% intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.held_out_tasks.jobs import START
from benchmarks.held_out_tasks.suite import SUITE
from vpd.evaluation import crossed_interval
from vpd.runs.folder import read_json

BASELINE = "grpo"

Result = dict[str, Any]
"""What a job has written."""


def read(out: Path) -> dict[str, dict[str, dict[int, Result]]]:
    """Read the finished jobs, by task, method and seed, tasks in the suite's order."""
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for task in SUITE:
        methods: dict[str, dict[int, Result]] = defaultdict(dict)
        for path in sorted((out / task).glob("*.json")):
            if (result := read_json(path)) is not None:
                methods[result["job"]["method"]][result["job"]["seed"]] = result
        if methods:
            found[task] = dict(methods)
    return found


def starts(out: Path) -> str:
    """Write the table of the starts."""
    lines = [
        "| task | demonstrations | start accuracy (95% interval) | mean reward | questions | distinct train |",
        "|---|---|---|---|---|---|",
    ]
    for task, methods in read(out).items():
        if START in methods:
            final = methods[START][0]["final"]
            interval = f"{final['accuracy']:.1%} ({final['low']:.1%} to {final['high']:.1%})"
            entry = SUITE[task]
            demonstrations = f"{entry.demonstrations} x {entry.epochs}" if entry.demonstrations else "none"
            train = len(entry.environment().tasks("train"))
            lines.append(f"| {task} | {demonstrations} | {interval} | {final['reward']:.3f} | {final['n']} | {train} |")
    return "\n".join(lines) + "\n"


def comparison(out: Path, measure: str = "outcomes") -> str:
    """Write the table of all methods by task, and their means over tasks.

    Args:
        out: The folder of the jobs.
        measure: ``outcomes`` for accuracies, or ``rewards`` for mean rewards.
    """
    results = read(out)
    lines = [
        f"| task | method | seeds | final | against the start | against {BASELINE} | best on selection | warnings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    gains: dict[str, list[float]] = defaultdict(list)
    for task, methods in results.items():
        start = methods.get(START, {}).get(0)
        if start is not None:
            of_start = start["final"][measure]
            lines.append(f"| {task} | start | | {statistics.fmean(of_start.values()):.1%} | | | | |")
        for method, runs in methods.items():
            if method == START:
                continue
            before = None if start is None else dict.fromkeys(runs, start)
            against_start, against_baseline = _paired(runs, before, measure), None
            if method != BASELINE:
                against_baseline = _paired(runs, methods.get(BASELINE), measure)
            if against_start is not None:
                gains[method].append(against_start[0])
            mean = statistics.fmean(v for run in runs.values() for v in run["final"][measure].values())
            peak = statistics.fmean(max((a for _, a in run["selection"]), default=0.0) for run in runs.values())
            seeds, names = " ".join(map(str, sorted(runs))), _warnings(runs)
            differences = f"{_points(against_start)} | {_points(against_baseline)}"
            lines.append(f"| {task} | {method} | {seeds} | {mean:.1%} | {differences} | {peak:.1%} | {names} |")
    lines += [
        "",
        "| method | tasks | mean gain on the start | lowest | tasks below the start |",
        "|---|---|---|---|---|",
    ]
    for method, values in gains.items():
        below = sum(value < 0 for value in values)
        mean = f"{100 * statistics.fmean(values):+.1f}"
        lines.append(f"| {method} | {len(values)} | {mean} | {100 * min(values):+.1f} | {below} |")
    lines += [
        "",
        f"Differences are in points, paired by question and, against {BASELINE}, by seed (seeds that both have); their "
        "95% intervals resample seeds and questions, with one seed questions alone. All seeds share a task's start.",
    ]
    return "\n".join(lines) + "\n"


def _paired(runs: dict[int, Result], others: dict[int, Result] | None, measure: str) -> tuple[float, ...] | None:
    """Return the mean difference with its interval over the seeds and questions that both have."""
    seeds = sorted(runs.keys() & (others or {}).keys())
    if others is None or not seeds:
        return None
    both = [(runs[seed]["final"][measure], others[seed]["final"][measure]) for seed in seeds]
    questions = sorted(set.intersection(*({*mine} & {*theirs} for mine, theirs in both)))
    values = [[mine[question] - theirs[question] for question in questions] for mine, theirs in both]
    return (statistics.fmean(value for row in values for value in row), *crossed_interval(values))


def _points(difference: tuple[float, ...] | None) -> str:
    if difference is None:
        return ""
    value, low, high = (100 * part for part in difference)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _warnings(runs: dict[int, Result]) -> str:
    """Name the warnings, and what ended runs before their time, with how many runs had each."""
    names = [name for run in runs.values() for name in {warning["name"] for warning in run["warnings"]}]
    names += [f"stopped by {run['stopped_by']}" for run in runs.values() if run["stopped_by"]]
    return ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
