"""Variational Policy Distillation: train language models from textual feedback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpd.config import ConfigError, VPDConfig
    from vpd.environments import Environment
    from vpd.trainer import VPDTrainer
    from vpd.types import Rollout, Task, Verdict

__all__ = ["ConfigError", "Environment", "Rollout", "Task", "VPDConfig", "VPDTrainer", "Verdict"]

_HOMES = {
    "ConfigError": "vpd.config",
    "Environment": "vpd.environments",
    "Rollout": "vpd.types",
    "Task": "vpd.types",
    "VPDConfig": "vpd.config",
    "VPDTrainer": "vpd.trainer",
    "Verdict": "vpd.types",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds to load, which `vpd --help` and the config schema need not pay.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vpd' has no attribute {name!r}")
