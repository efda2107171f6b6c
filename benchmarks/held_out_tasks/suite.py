"""The suite: its tasks with the settings of their starts, and the methods that are set side by side.

A start is chosen so that the model answers between 10% and 70% of the final questions before training: as it comes,
or after a short warm start on demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.held_out_tasks import choices, numbers, texts
from benchmarks.held_out_tasks.base import OwnTask
from benchmarks.own_tasks import run_one as own_tasks

Sections = Mapping[str, Mapping[str, Any]]
"""Settings of :class:`vpd.VPDConfig` by section."""


@dataclass(frozen=True)
class Entry:
    """A task of the suite.

    Attributes:
        environment: Makes the task's environment.
        demonstrations: How many demonstrations the warm start learns from; 0 begins with the model as it comes.
        epochs: How often the warm start goes over them.
        completion_tokens: The length limit of a completion.
        success_threshold: The reward from which a completion is a success.
    """

    environment: type[OwnTask]
    demonstrations: int = 16
    epochs: int = 2
    completion_tokens: int = 24
    success_threshold: float = 1.0


SUITE: dict[str, Entry] = {
    "short-sentence": Entry(texts.ShortSentence),
    "json": Entry(texts.JsonObject, demonstrations=8, completion_tokens=32),
    "units": Entry(numbers.UnitConversion, completion_tokens=12),
    "spelling": Entry(texts.Spelling),
    "sorting": Entry(numbers.Sorting),
    "letter-count": Entry(numbers.LetterCount, completion_tokens=12),
    "sum-of-two": Entry(numbers.SumOfTwo),
    "sum-of-three": Entry(numbers.SumOfThree, completion_tokens=32),
    "product": Entry(numbers.Product),
    "expression": Entry(texts.Expression),
    "largest": Entry(choices.LargestNumber, completion_tokens=12),
    "odd-one-out": Entry(choices.OddOneOut, completion_tokens=12),
    "word-budget": Entry(texts.WordBudget, success_threshold=0.8),
}

METHODS: dict[str, Sections] = {name: {"algorithm": algorithm} for name, algorithm in own_tasks.METHODS.items()}

SETTINGS: Sections = {
    "rollout": {"prompts_per_step": own_tasks.PROMPTS, "num_generations": own_tasks.GENERATIONS},
    "eval": {"eval_on_start": False, "final_tasks": 0, "preflight_tasks": 8},
    "run": {"logged_samples": 8},
}
"""The settings of all jobs that are not the trainer's own defaults; the runner measures the final split itself."""
