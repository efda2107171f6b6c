"""Writes a commented config to begin with, from the schema and its docstrings."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from vpd.config.describe import Setting, described, environments, toml_value
from vpd.config.section import ConfigError, did_you_mean

_SHOWN = {
    "model": ("name",),
    "rollout": ("prompts_per_step", "num_generations", "max_completion_length"),
    "feedback": ("sources",),
    "optim": ("learning_rate",),
    "eval": ("eval_steps", "final_tasks"),
    "run": ("output_dir", "max_steps", "max_seconds"),
}
"""The settings of each section that most people change."""

_WIDTH = 100


def needed_settings(environment: str) -> list[Setting]:
    """Return the settings of an environment that have no default, or whose absence hardly anyone wants.

    Raises:
        ConfigError: There is no such environment.
    """
    known = environments()
    if environment not in known:
        hint = did_you_mean(environment, known)
        raise ConfigError(f"There is no environment {environment!r}.{hint} There are: {', '.join(known)}.")
    usual = {"reasoning_gym": "dataset", "prompts": "reward_funcs"}.get(environment)
    settings = described(f"data.{environment}")[f"data.{environment}"]
    return [s for s in settings if (s.default == "needed" or s.name == usual) and "." not in s.name]


def starter_config(environment: str, given: Mapping[str, Any], model: str, output_dir: str) -> str:
    """Write a config for an environment: what is given is set, and the rest stands there as comments.

    Args:
        environment: The environment's name.
        given: The values of its settings.
        model: The model's name or folder.
        output_dir: The folder of the run.
    """
    values = {
        "model": {"name": model},
        "data": {"environment": environment, **given},
        "run": {"output_dir": output_dir},
    }
    parts = [
        "# A config for vpd. Settings with a # before them stand at their defaults; vpd settings tells of all others.\n"
        "# Paths are relative to this file. Look at one group before training: vpd train THIS_FILE --dry-run"
    ]
    for section in ("model", "data", *list(_SHOWN)[1:]):
        name = f"data.{environment}" if section == "data" else section
        shown = [s for s in described(name)[name] if section == "data" or s.name in _SHOWN[section]]
        lines = [_lines_of(s, values.get(section, {})) for s in shown if "." not in s.name]
        parts.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _lines_of(setting: Setting, values: Mapping[str, Any]) -> str:
    comment = textwrap.fill(setting.text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    if setting.name in values:
        return f"{comment}\n{setting.name} = {toml_value(values[setting.name])}"
    value = setting.default
    # TOML has no word for what is unset.
    return f"{comment}\n# {setting.name} = " + ("..." if value in ("none", "needed", "its defaults") else value)
