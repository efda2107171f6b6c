"""The settings of adapters (LoRA)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd.config.section import Section


class LoraSettings(Section):
    """The settings of adapters (LoRA); the names are PEFT's."""

    r: int = Field(default=16, ge=1)
    """The rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """The scale of the adapters; PEFT multiplies their output by ``lora_alpha / r``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The dropout probability inside the adapters; frozen scoring passes have no dropout."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """The names of the layers that get an adapter; ``all-linear`` takes every linear layer but the head."""
