"""Tells whether a model may be packed, by its own description and by a trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from vpd.packing.batch import hidden_states, pack
from vpd.packing.trie import Tokens

PACKABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

# These architectures carry state across tokens, and some say so neither by layer types nor by a flag.
STATEFUL_MODEL_TYPES = ("mamba", "rwkv", "jamba", "bamba", "zamba", "xlstm", "recurrent", "falcon_h1", "nemotron_h")


def packable(model_or_config: Any) -> tuple[bool, str]:
    """Tell whether packed attention gives what separate sequences give, as far as the model's description says.

    Args:
        model_or_config: A transformers model (also wrapped by PEFT) or its configuration.

    Returns:
        The answer, and the reason as a sentence if it is no ("" if it is yes).
    """
    is_config = isinstance(model_or_config, PreTrainedConfig)
    config = (model_or_config if is_config else model_or_config.config).get_text_config()
    # A configuration without a registered causal model can be judged by its own fields only.
    described = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) if is_config else model_or_config
    name = config.model_type

    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - PACKABLE_LAYER_TYPES)
    if other_layers:
        return False, f"{name} has layers of type {', '.join(other_layers)}, which do not attend to a branch alone."
    is_stateful = getattr(described, "_is_stateful", False) or any(part in name for part in STATEFUL_MODEL_TYPES)
    if is_stateful:
        return False, f"{name} carries state across tokens, so branches of a prefix would leak into each other."
    for field in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, field, None):
            return False, f"{name} sets {field}, which packed attention does not compute."
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return False, f"{name} is not causal."
    for flag in ("_supports_sdpa", "_supports_attention_backend"):
        if described is not None and not getattr(described, flag, False):
            return False, f"{name} does not take its attention from transformers' interface ({flag} is not set)."
    return True, ""


class PackingDifference(NamedTuple):
    """How far packed hidden states are from separate ones.

    Attributes:
        absolute: The largest difference of an element.
        relative: The absolute difference divided by the largest element of the separate states.
    """

    absolute: float
    relative: float


@torch.no_grad()
def check_packed_equals_separate(
    backbone: nn.Module, sequences: Sequence[Tokens], completion_starts: Sequence[int]
) -> PackingDifference:
    """Run a few sequences packed and one by one, and compare the hidden states that predict their completions.

    Architectures hide state in places that no configuration names, so that a run tries before it trusts. Sequences
    that are longer than the model's sliding window try the window, too.

    Args:
        backbone: The model without its head, with packed attention enabled, on any device and in any dtype. It is
            compared in evaluation mode and left in the mode it had.
        sequences: The token ids of prompts with completions, some with a prefix in common.
        completion_starts: The index of each sequence's first completion token.

    Raises:
        ValueError: A layer refuses packed attention; the message says why.
    """
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    try:
        packed, separate = (
            hidden_states(backbone, batch)[batch.predictor].float()
            for batch in (
                pack(sequences, completion_starts, share_prefixes=share).to(device) for share in (True, False)
            )
        )
    finally:
        backbone.train(was_training)
    absolute = (packed - separate).abs().max().item()
    return PackingDifference(absolute, absolute / max(separate.abs().max().item(), torch.finfo(torch.float32).tiny))
