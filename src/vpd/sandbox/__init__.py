"""Runs model-written programs behind the kernel's isolation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpd.sandbox.limits import Limits
    from vpd.sandbox.sandbox import (
        SAFE_LEVELS,
        Answer,
        Ended,
        Functions,
        Level,
        Sandbox,
        SandboxError,
        choose_level,
        why_not,
    )

__all__ = [
    "SAFE_LEVELS",
    "Answer",
    "Ended",
    "Functions",
    "Level",
    "Limits",
    "Sandbox",
    "SandboxError",
    "choose_level",
    "why_not",
]


def __getattr__(name: str) -> Any:
    # The sandboxed side imports this package too, and should hold none of the trainer's side.
    if name in __all__:
        from vpd.sandbox import limits, sandbox

        return getattr(limits if name == "Limits" else sandbox, name)
    raise AttributeError(f"module 'vpd.sandbox' has no attribute {name!r}")
