"""The sandbox: it runs model-written programs behind the kernel's isolation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpd.sandbox.levels import SAFE_LEVELS, choose_level, why_not
    from vpd.sandbox.limits import Limits
    from vpd.sandbox.sandbox import CallResult, Functions, Sandbox
    from vpd.sandbox.worker import Level, ProgramResult, SandboxError, check_packages

__all__ = [
    "SAFE_LEVELS",
    "CallResult",
    "Functions",
    "Level",
    "Limits",
    "ProgramResult",
    "Sandbox",
    "SandboxError",
    "check_packages",
    "choose_level",
    "why_not",
]


def __getattr__(name: str) -> Any:
    # The sandboxed process imports this package too, and should load nothing of the trainer's side.
    if name in __all__:
        for module in ("limits", "worker", "levels", "sandbox"):
            found = importlib.import_module(f"vpd.sandbox.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module 'vpd.sandbox' has no attribute {name!r}")
