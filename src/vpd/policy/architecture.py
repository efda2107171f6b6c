"""The two parts of a causal language model that the losses need: its backbone and its output head.

Architectures differ in what they do to the logits after the output layer. A loss that leaves this out trains another
distribution than the one that samples. :func:`head_of` reads what it knows of this from the model's config, and
:func:`verify_head` tells whether that was all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vpd.config import ConfigError
from vpd.losses import Head

# These config fields multiply the logits, in Cohere and in Falcon-H1.
_FACTORS = ("logit_scale", "lm_head_multiplier")
# This field divides them in Granite and MiniCPM3, while HyperCLOVA X has the same name for a factor.
_DIVISOR = "logits_scaling"
_DIVISOR_IS_FACTOR = {"hyperclovax"}
# These fields cap the logits, in Gemma with its relatives and in RecurrentGemma.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

_CHECKED_TOKENS = 4


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, with its adapters. A model without a wrapper is returned."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model  # type: ignore[return-value]


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the part that maps token ids to ``last_hidden_state``, the final norm included.

    Raises:
        ConfigError: The model has no such part.
    """
    language_model = causal_lm_of(model)
    backbone = getattr(language_model, getattr(language_model, "base_model_prefix", "") or "model", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"{type(language_model).__name__} has no part that gives hidden states without logits, which the losses "
            "need: choose a causal language model of transformers."
        )
    return backbone


def head_of(model: nn.Module) -> Head:
    """Return the output head. It shares the model's own parameters, so that gradients reach them.

    Raises:
        ConfigError: The output layer is not a plain linear layer. Adapters on it are not supported.
    """
    language_model = causal_lm_of(model)
    layer = language_model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise ConfigError(
            f"The output layer of {type(language_model).__name__} is a {type(layer).__name__}, and the losses need a "
            "plain linear layer: leave it out of the adapters' target_modules and modules_to_save, and unquantised."
        )
    config = language_model.config
    return Head(layer.weight, layer.bias, scale=_scale(config), softcap=_softcap(config))


@torch.no_grad()
def verify_head(model: nn.Module) -> float:
    """Compare the head's logits with the model's own on a few tokens.

    Returns:
        The largest absolute difference.

    Raises:
        ConfigError: They differ by more than rounding, so the architecture does something to its logits that is not
            known here.
    """
    language_model = causal_lm_of(model)
    was_training = language_model.training
    language_model.eval()
    try:
        head = head_of(language_model)
        tokens = (torch.arange(_CHECKED_TOKENS, device=head.weight.device) % head.vocabulary_size)[None]
        expected = language_model(input_ids=tokens, use_cache=False).logits[0]
        hidden = backbone_of(language_model)(input_ids=tokens, use_cache=False).last_hidden_state[0]
        logits = head.logits(hidden)
    finally:
        language_model.train(was_training)
    difference = (logits - expected.float()).abs().max().item()
    # The model rounds its logits to its own dtype, which the head does not.
    tolerance = max(1e-5, 4 * torch.finfo(expected.dtype).eps) * max(1.0, expected.abs().max().item())
    if not difference <= tolerance:
        raise ConfigError(
            f"{type(language_model).__name__} changes its logits after the output layer in a way that is not known: "
            f"they differ by {difference:.2g} (at most {tolerance:.2g} is rounding), so the losses would train another "
            "distribution than the one that samples. Choose another architecture."
        )
    return difference


def _scale(config: Any) -> float:
    scale = 1.0
    for name in _FACTORS:
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, _DIVISOR, None) or 1.0
    return scale * divisor if config.model_type in _DIVISOR_IS_FACTOR else scale / divisor


def _softcap(config: Any) -> float | None:
    caps = (getattr(config, name, None) for name in _SOFTCAPS)
    return next((float(cap) for cap in caps if cap), None)
