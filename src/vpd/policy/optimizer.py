"""Makes the optimizer and its schedule from the ``[optim]`` section."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import get_scheduler

from vpd.config import ConfigError, OptimSettings
from vpd.device import is_cpu

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(settings: OptimSettings, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make AdamW as one kernel for all weights, which is several times faster than a loop over them, also on a CPU."""
    return torch.optim.AdamW(
        list(parameters),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's moments, which are zero, before its first step, for weights on the CPU that have none yet.

    They are kept for the whole run. Moments that the first step makes take the places that its activations leave, and
    split the memory that later steps need in one piece, so that the heap grows around them.

    Args:
        optimizer: Any optimizer, prepared by accelerate or not; only torch's AdamW is given moments.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if is_cpu(weight) and not group["amsgrad"] and not optimizer.state[weight]:
                # Its first step would make the same tensors.
                step = torch.zeros((), dtype=torch.float32, device=weight.device)
                moments = {name: torch.zeros_like(weight, memory_format=torch.preserve_format) for name in _MOMENTS}
                optimizer.state[weight] = {"step": step, **moments}


def make_scheduler(settings: OptimSettings, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """Make one of transformers' schedules, which advances once a rollout batch.

    Raises:
        ConfigError: Transformers does not know the name, or there is no setting for something the schedule needs.
    """
    try:
        return get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=max_steps,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"optim.lr_scheduler_type = {settings.lr_scheduler_type!r} cannot be used: {error}"
        ) from error
