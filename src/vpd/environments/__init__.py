"""The environments: they bring the tasks and judge the completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpd.config import (
    CodeData,
    ConfigError,
    DataSettings,
    MathData,
    McqData,
    PromptData,
    ReasoningGymData,
    RubricData,
    ToolUseData,
    VerifiersData,
)
from vpd.environments.base import SPLITS, Environment, Split
from vpd.environments.code import Code
from vpd.environments.judging import Outcome, judge_all
from vpd.environments.math import Math
from vpd.environments.mcq import MultipleChoice
from vpd.environments.prompt_dataset import PromptDataset
from vpd.environments.reasoning_gym import ReasoningGym
from vpd.environments.rubric import Rubric
from vpd.environments.tool_use import ToolUse
from vpd.environments.verifiers import Verifiers
from vpd.sandbox import Limits

__all__ = [
    "SPLITS",
    "Code",
    "Environment",
    "Math",
    "MultipleChoice",
    "Outcome",
    "PromptDataset",
    "ReasoningGym",
    "Rubric",
    "Split",
    "ToolUse",
    "Verifiers",
    "choose_environment",
    "judge_all",
    "make_environment",
]


def make_environment(settings: DataSettings) -> Environment:
    """Make the environment that the ``[data]`` section describes; raise ConfigError where its data cannot be used."""
    values = settings.model_dump(exclude={"environment"})
    match settings:
        case ReasoningGymData():
            return ReasoningGym(**values)
        case McqData():
            return MultipleChoice(**values)
        case CodeData():
            chosen = settings.limits.model_dump(exclude_none=True)
            if settings.limits.packages is not None:
                chosen["packages"] = tuple(settings.limits.packages)
            return Code(**{**values, "limits": Limits(**chosen)})
        case MathData():
            return Math(**values)
        case ToolUseData():
            return ToolUse(**values)
        case RubricData():
            return Rubric(**values)
        case VerifiersData():
            return Verifiers(**values)
        case PromptData():
            if settings.path is None:
                raise ConfigError(
                    "data.path is missing: give a file or dataset of prompts, or a train_dataset in Python."
                )
            return PromptDataset(values.pop("path"), **values)


def _sizes(settings: DataSettings | None) -> dict[str, Any]:
    """Return what ``args.data`` may say beside a dataset given in Python: the sizes of its splits, and their seed."""
    if settings is None:
        return {}
    names = {"environment", "selection_size", "final_size", "seed"}
    if not isinstance(settings, PromptData) or settings.model_fields_set - names:
        raise ConfigError(
            'Beside train_dataset, args.data may be of the environment "prompts" and hold selection_size, final_size '
            "and seed alone: leave the rest of it out, or leave train_dataset out."
        )
    return settings.model_dump(include=names - {"environment"})


def choose_environment(
    settings: DataSettings | None,
    environment: Environment | None,
    train_dataset: Any,
    reward_funcs: Any,
    eval_dataset: Any,
    reward_weights: Sequence[float] | None,
) -> Environment:
    """Choose the trainer's environment: the one given, or one made from a dataset and functions, or from settings.

    Raises:
        ConfigError: The arguments contradict each other, or there are no tasks.
    """
    if environment is not None:
        if train_dataset is not None or reward_funcs is not None:
            raise ConfigError("Give either an environment, or train_dataset with reward_funcs, not both.")
        return environment
    if train_dataset is not None or reward_funcs is not None:
        if train_dataset is None:
            raise ConfigError("train_dataset and reward_funcs go together: the dataset is missing.")
        sizes = _sizes(settings)
        return PromptDataset(
            train_dataset, reward_funcs, eval_dataset=eval_dataset, reward_weights=reward_weights, **sizes
        )
    if settings is None:
        raise ConfigError("There are no tasks: give an environment, a train_dataset with reward_funcs, or args.data.")
    return make_environment(settings)
