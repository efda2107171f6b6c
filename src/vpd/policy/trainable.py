"""Checks at the start that a network can be trained, and gives it weights that small updates can move."""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from vpd.config import ConfigError, ModelSettings
from vpd.policy.adapter import has_teacher_adapter
from vpd.policy.saved_adapter import active_adapter, refuse_virtual_tokens

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)


def check_adapters(network: nn.Module, peft_config: Any) -> None:
    """Raise ConfigError for adapters that cannot be trained here, or that are given twice."""
    if peft_config is not None:
        refuse_virtual_tokens(peft_config)
    if not isinstance(network, PeftModel) or has_teacher_adapter(network):
        return
    if peft_config is not None:
        raise ConfigError(
            "The model has adapters already, so those of peft_config (or model.lora) would be left out: give a model "
            "without adapters, or leave peft_config and model.lora out."
        )
    refuse_virtual_tokens(network.peft_config[active_adapter(network)])


def make_trainable(network: nn.Module, settings: ModelSettings) -> None:
    """Give all trained parameters the dtype float32, unless the settings ask for bfloat16, which is warned of.

    Raises:
        ConfigError: Nothing can be trained, or weights are float64, which nothing here computes in.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            "No parameter of the model is trained: it is frozen, or its adapter was loaded with is_trainable=False. "
            "Set requires_grad on what is to be trained, load the adapter with is_trainable=True, or set model.lora."
        )
    if any(parameter.dtype == torch.float64 for parameter in network.parameters()):
        raise ConfigError("The model has float64 weights, which are not computed here: convert it by model.float().")
    halves = [parameter for parameter in trained if parameter.dtype in _HALF]
    if not halves:
        return
    if settings.dtype == "float32":
        if not isinstance(network, PeftModel):
            network.float()
        for parameter in halves:
            parameter.data = parameter.data.float()
        logger.warning(
            "The trained weights came in half precision and are kept in float32, so that updates reach them."
        )
        return
    logger.warning(
        "The trained weights are kept in bfloat16, which has 8 bits of precision: an update below 1/512 of a weight is "
        "rounded away. "
        'Set model.dtype = "float32"; products are in bfloat16 by model.autocast all the same.'
    )
