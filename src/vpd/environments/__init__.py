"""Where tasks come from and how completions are judged."""

from __future__ import annotations

from vpd.config import DataSettings, McqData, PromptData, ReasoningGymData
from vpd.environments.base import SPLITS, Environment, Split
from vpd.environments.judging import Outcome, judge_all
from vpd.environments.mcq import MultipleChoice
from vpd.environments.prompts import PromptDataset
from vpd.environments.reasoning_gym import ReasoningGym

__all__ = [
    "SPLITS",
    "Environment",
    "MultipleChoice",
    "Outcome",
    "PromptDataset",
    "ReasoningGym",
    "Split",
    "judge_all",
    "make_environment",
]


def make_environment(settings: DataSettings) -> Environment:
    """The environment that the ``[data]`` section describes; raises ConfigError where its data cannot be used."""
    values = settings.model_dump(exclude={"environment"})
    match settings:
        case ReasoningGymData():
            return ReasoningGym(**values)
        case McqData():
            return MultipleChoice(**values)
        case PromptData():
            return PromptDataset(values.pop("path"), **values)
