"""Settings under the names that TRL's users know: flat ones, and those of a whole ``GRPOConfig``."""

from __future__ import annotations

import math
import warnings
from dataclasses import MISSING, fields
from typing import Any

from vpd.config.algorithm import algorithm_class
from vpd.config.section import ConfigError

FLAT_NAMES = {
    "learning_rate": "optim",
    "weight_decay": "optim",
    "adam_beta1": "optim",
    "adam_beta2": "optim",
    "adam_epsilon": "optim",
    "max_grad_norm": "optim",
    "lr_scheduler_type": "optim",
    "warmup_steps": "optim",
    "num_generations": "rollout",
    "max_completion_length": "rollout",
    "max_prompt_length": "rollout",
    "temperature": "rollout",
    "top_p": "rollout",
    "top_k": "rollout",
    "min_p": "rollout",
    "output_dir": "run",
    "seed": "run",
    "max_steps": "run",
    "num_train_epochs": "run",
    "save_steps": "run",
    "save_total_limit": "run",
    "report_to": "run",
    "eval_steps": "eval",
    "load_best_model_at_end": "eval",
    "gradient_checkpointing": "model",
    "chat_template_kwargs": "model",
}
"""The section of each setting that may stand outside of its section, under a name of TRL's."""

_OTHERWISE_NAMED = {
    "per_device_train_batch_size": "rollout.prompts_per_step (prompts, not completions)",
    "gradient_accumulation_steps": "rollout.prompts_per_step, and algorithm.m_minibatch_prompts for several updates",
    "generation_batch_size": "rollout.prompts_per_step (prompts, not completions)",
    "steps_per_generation": "algorithm.m_minibatch_prompts",
    "mask_truncated_completions": 'algorithm.truncated = "mask"',
    "reward_weights": "VPDTrainer(reward_weights=...)",
}

_TRANSLATED = FLAT_NAMES.keys() | {
    *_OTHERWISE_NAMED.keys(),
    *("eval_strategy", "save_strategy", "beta", "epsilon", "epsilon_high", "scale_rewards", "loss_type"),
    # bf16 is how products are computed, which model.autocast = "auto" decides; each step is logged.
    *("bf16", "activation_checkpointing"),
    # transformers fills these in by itself.
    *("accelerator_config", "do_eval"),
}
_TRACKERS = ("tensorboard", "wandb", "trackio")
_AGGREGATIONS = {"grpo": "sequence_mean", "bnpo": "token_mean", "dapo": "token_mean"}


def without_flat_names(values: dict[str, Any]) -> dict[str, Any]:
    """Put the settings that stand outside of their sections into them.

    Raises:
        ValueError: A setting is given twice, or its counterpart has another name.
    """
    nested = dict(values)
    for name in values.keys() & _OTHERWISE_NAMED.keys():
        raise ValueError(
            f"{name} is called otherwise here: {_OTHERWISE_NAMED[name]}; VPDConfig.from_trl(GRPOConfig(...)) translates"
        )
    if (every := nested.pop("logging_steps", 1)) != 1:
        _warn_of({"logging_steps": every})
    for name in values.keys() & FLAT_NAMES.keys():
        section = nested.get(FLAT_NAMES[name], {})
        given = section if isinstance(section, dict) else section.model_dump(exclude_unset=True)
        if name in given:
            raise ValueError(
                f"{name} is given twice, as {name} and as {FLAT_NAMES[name]}.{name}: leave one of them out"
            )
        value = nested.pop(name)
        nested[FLAT_NAMES[name]] = {**given, name: [value] if name == "report_to" and isinstance(value, str) else value}
    return nested


def settings_of_trl(args: Any, algorithm: dict[str, Any]) -> dict[str, Any]:
    """Translate TRL's ``GRPOConfig`` into sections of settings, and warn of what has no counterpart.

    Args:
        args: The ``GRPOConfig``.
        algorithm: The settings of the algorithm to train with, ``type`` among them. Settings of GRPO that it has, too,
            are taken over.

    Raises:
        ConfigError: Batches or rewards would come out otherwise than in TRL.
    """
    left_out = _others(args)
    updates = _updates_per_batch(args)
    prompts = args.generation_batch_size // args.num_generations
    flat = {name: getattr(args, name) for name in FLAT_NAMES if getattr(args, name, None) is not None}
    flat["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    trackers = [name for name in args.report_to or [] if name in _TRACKERS]
    if others := [name for name in args.report_to or [] if name not in _TRACKERS]:
        left_out["report_to"] = others
    flat["report_to"] = trackers
    if args.max_steps > 0:
        flat["max_steps"] = math.ceil(args.max_steps / updates)
        del flat["num_train_epochs"]
    else:
        del flat["max_steps"]
    for kind in ("eval", "save"):
        strategy = str(getattr(getattr(args, f"{kind}_strategy"), "value", getattr(args, f"{kind}_strategy")))
        steps = flat.pop(f"{kind}_steps", None)
        if strategy == "steps" and steps:
            flat[f"{kind}_steps"] = _whole(f"{kind}_steps", steps, args, updates)
        elif strategy not in ("no", "steps"):
            left_out[f"{kind}_strategy"] = strategy
    flat["warmup_steps"] = _whole("warmup_steps", args.warmup_steps, args, updates)
    # TRL keeps all checkpoints where no limit is given.
    flat.setdefault("save_total_limit", 10**6)
    nested = without_flat_names(flat)
    nested["rollout"]["prompts_per_step"] = prompts
    nested["algorithm"] = {**_algorithm(args, algorithm, left_out), **algorithm}
    if updates > 1:
        nested["algorithm"].setdefault("m_minibatch_prompts", prompts // updates)
    if left_out:
        _warn_of(left_out)
    return nested


def _updates_per_batch(args: Any) -> int:
    """How many optimizer steps TRL makes on one batch of rollouts."""
    if args.reward_weights is not None:
        raise ConfigError("GRPOConfig.reward_weights goes to the trainer here: VPDTrainer(reward_weights=...).")
    if args.num_iterations != 1:
        raise ConfigError(
            f"GRPOConfig.num_iterations = {args.num_iterations} has no counterpart: a batch of rollouts is learned "
            "from once. Set it to 1."
        )
    updates, rest = divmod(args.steps_per_generation, args.gradient_accumulation_steps)
    prompts = args.generation_batch_size // args.num_generations
    if rest or not updates or prompts % updates:
        raise ConfigError(
            f"GRPOConfig.steps_per_generation = {args.steps_per_generation} with gradient_accumulation_steps = "
            f"{args.gradient_accumulation_steps} cuts a batch of {prompts} prompts into parts that are no whole "
            "numbers of prompts: make each update a whole number of prompts."
        )
    return updates


def _algorithm(args: Any, given: dict[str, Any], left_out: dict[str, Any]) -> dict[str, Any]:
    """Take over what the algorithm shares with GRPO; what it lacks joins ``left_out`` where it was set."""
    aggregation = _AGGREGATIONS.get(args.loss_type)
    scale = {"group": True, "none": False, True: True, False: False}.get(args.scale_rewards)
    values = {
        "beta": ("beta", args.beta),
        "epsilon": ("epsilon", args.epsilon),
        "epsilon_high": ("epsilon_high", args.epsilon if args.epsilon_high is None else args.epsilon_high),
        "scale_rewards": ("scale_rewards", scale),
        "loss_type": ("loss_aggregation", aggregation),
    }
    known = algorithm_class(given["type"]).settings_class.model_fields
    defaults = {field.name: field.default for field in fields(args)}
    taken = {}
    for name, (ours, value) in values.items():
        if ours in known and value is not None:
            taken[ours] = value
        elif getattr(args, name) != defaults.get(name):
            left_out[name] = getattr(args, name)
    if args.mask_truncated_completions:
        taken["truncated"] = "mask"
    return taken


def _whole(name: str, value: float, args: Any, updates: int) -> int:
    """A number of batches of rollouts for a number of TRL's steps, or for a share of all of them (below 1)."""
    if 0 < value < 1:
        if args.max_steps <= 0:
            raise ConfigError(f"GRPOConfig.{name} = {value} is a share of max_steps, which is not set: set it.")
        value = value * args.max_steps
    return math.ceil(value / updates)


def _others(args: Any) -> dict[str, Any]:
    """The settings without a counterpart that are not at their defaults."""
    found = {}
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        value = getattr(args, field.name, None)
        ours = field.name in _TRANSLATED or (field.name, value) == ("logging_steps", 1)
        if not ours and value is not None and not _same(value, default):
            found[field.name] = value
    return found


def _same(value: Any, default: Any) -> bool:
    value, default = getattr(value, "value", value), getattr(default, "value", default)
    return value == default or (not value and not default)


def _warn_of(left_out: dict[str, Any]) -> None:
    listed = ", ".join(f"{name} = {value!r}" for name, value in sorted(left_out.items()))
    warnings.warn(
        f"These settings of TRL have no effect here: {listed}. (Each step is logged; models are loaded by [model].)",
        UserWarning,
        stacklevel=3,
    )
