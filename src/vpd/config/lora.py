"""Settings of adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpd.config.section import Section


class LoraSettings(Section):
    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapters; PEFT multiplies by ``lora_alpha / r``."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout inside the adapters, off in every scoring pass that is frozen."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter."""
