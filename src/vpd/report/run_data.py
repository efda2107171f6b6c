"""The data of one run that its page shows, read from the run's folder; anything may be missing there."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vpd.runs import RolloutRecord, RunError, read_metrics, read_rollouts
from vpd.runs.folder import read_json, rollout_files

logger = logging.getLogger(__name__)

Entry = dict[str, Any]

_SAMPLED_STEPS = 10


@dataclass(frozen=True)
class RunData:
    """The contents of one run's files.

    Attributes:
        name: The name of the run's folder.
        config: The resolved settings; empty where they are missing.
        metrics: The lines of ``metrics.jsonl``, in their order.
        result: The contents of ``result.json``; None while the run has not finished.
        samples: The rollouts to show, in the order of their steps.
    """

    name: str
    config: Entry
    metrics: list[Entry]
    result: Entry | None
    samples: list[RolloutRecord]

    def is_success(self, record: RolloutRecord) -> bool:
        """Tell whether a rollout has succeeded."""
        return succeeded(record, threshold_of(self.config))

    def entries(self, event: str) -> list[Entry]:
        """Return the metrics of one kind of event."""
        return [entry for entry in self.metrics if entry.get("event") == event]

    def setting(self, key: str) -> Any:
        """Return the setting at a dotted key; None where it is missing."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def load_run(folder: Path, samples: int) -> RunData:
    """Read the folder of a run that may or may not have finished.

    Args:
        folder: The run's folder.
        samples: How many rollouts to read at most.

    Raises:
        RunError: The folder holds no run, or one of its JSON files is broken. (A broken file of rollouts is left out.)
    """
    config = read_json(folder / "config.json")
    metrics = read_metrics(folder)
    result = read_json(folder / "result.json")
    if config is None and result is None and not metrics:
        raise RunError(f"{folder} holds no run: there is no config.json, metrics.jsonl or result.json in it.")
    return RunData(
        name=folder.resolve().name,
        config=config or {},
        metrics=metrics,
        result=result,
        samples=sample_rollouts(rollout_files(folder), samples, threshold_of(config or {})),
    )


def threshold_of(config: Entry) -> float:
    """Return the reward at which a rollout counts as a success."""
    algorithm = config.get("algorithm")
    threshold = number(algorithm.get("success_threshold")) if isinstance(algorithm, dict) else None
    return 1.0 if threshold is None else threshold


def succeeded(record: RolloutRecord, threshold: float) -> bool:
    """Tell whether a rollout has succeeded: as the run noted it, or else by the threshold."""
    if record.success is not None:
        return record.success
    return record.reward is not None and record.reward >= threshold


def sample_rollouts(files: dict[int, Path], count: int, threshold: float) -> list[RolloutRecord]:
    """Choose up to ``count`` rollouts, spread evenly over steps, successes and failures, without any randomness."""
    steps = list(files)
    if len(steps) > _SAMPLED_STEPS:
        last = len(steps) - 1
        steps = [steps[round(i * last / (_SAMPLED_STEPS - 1))] for i in range(_SAMPLED_STEPS)]
    by_step = [_alternating(_readable(files[step]), threshold) for step in steps]
    rounds = (record for each in zip_longest(*by_step) for record in each if record is not None)
    chosen = [record for record, _ in zip(rounds, range(count), strict=False)]
    return sorted(chosen, key=lambda record: record.step)


def _readable(path: Path) -> list[RolloutRecord]:
    try:
        return read_rollouts(path)
    except RunError as error:
        logger.warning("The report leaves rollouts out: %s", error)
        return []


def _alternating(records: Iterable[RolloutRecord], threshold: float) -> list[RolloutRecord]:
    """Order the rollouts as success, failure, success, ...

    Among the rollouts of one kind, the first of every group comes before the second of any group.
    """
    seen: dict[tuple[int, bool], int] = defaultdict(int)
    ranked: dict[bool, list[tuple[int, RolloutRecord]]] = {True: [], False: []}
    for record in records:
        success = succeeded(record, threshold)
        ranked[success].append((seen[record.group, success], record))
        seen[record.group, success] += 1
    successes, failures = (
        [record for _, record in sorted(ranked[kind], key=lambda pair: pair[0])] for kind in (True, False)
    )
    return [record for pair in zip_longest(successes, failures) for record in pair if record is not None]


def number(value: Any) -> float | None:
    """Return ``value`` as a float where it is a finite number, and None otherwise."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def series(entries: Iterable[Entry], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of one metric, where it is a finite number."""
    points = [
        (step, value)
        for entry in entries
        if (value := number(entry.get(key))) is not None and (step := number(entry.get("step"))) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]
