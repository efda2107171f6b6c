"""Evaluates a model outside a training run."""

from __future__ import annotations

import torch

from vpd.config import ConfigError, VPDConfig
from vpd.device import training_device
from vpd.environments import Split, make_environment
from vpd.evaluation.accuracy import Evaluation, evaluate
from vpd.feedback import PromptBuilder
from vpd.policy.load import eos_token_ids, load_policy
from vpd.rollout import RolloutSampler, make_engine


def evaluate_standalone(settings: VPDConfig, split: Split, limit: int | None) -> Evaluation:
    """Load ``settings.model`` and evaluate it on a split of ``settings.data``.

    Args:
        settings: The settings of a run.
        split: The split whose tasks are asked.
        limit: How many of its tasks are asked at most; None asks all.

    Raises:
        ConfigError: There is no ``[data]`` section, or the model cannot be loaded.
    """
    if settings.data is None:
        raise ConfigError("There are no tasks: the config has no [data] section.")
    environment = make_environment(settings.data)
    loaded = load_policy(settings.model.name, dtype=getattr(torch, settings.model.dtype))
    loaded.model.to(training_device())  # pyright: ignore[reportArgumentType]
    sampler = RolloutSampler(
        make_engine(loaded.model, loaded.tokenizer, settings.rollout),
        loaded.tokenizer,
        environment,
        PromptBuilder(
            loaded.tokenizer, settings.feedback, settings.rollout.max_prompt_length, settings.model.chat_template_kwargs
        ),
        settings.rollout,
        eos_token_ids(loaded.model, loaded.tokenizer),
        truncated_fails=settings.algorithm.truncated != "judge",
    )
    tasks = list(environment.tasks(split))[:limit]
    return evaluate(sampler, tasks, settings.eval, settings.algorithm.success_threshold, seed=settings.run.seed)
