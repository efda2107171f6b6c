"""Attention of the network that samples, registered with transformers as ``vpd_rollout``.

transformers' own, but for one case: a decoding step without padding on the processor. There PyTorch's kernel takes the
query heads of a key head one by one, which for a single query of bfloat16, on a processor without AMX, takes several
times as long as the same queries as rows of one matrix (transformers makes rows of them itself where there is a mask).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROLLOUT_ATTENTION = "vpd_rollout"
_NOT_PLAIN = ("position_bias", "softcap", "s_aux", "cache")


def rollout_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature.

    Args:
        module: the attention layer.
        query: [B, heads, Q, D].
        key: [B, key heads, T, D].
        value: [B, key heads, T, D of values].
        attention_mask: what ``sdpa`` takes.
        kwargs: what ``sdpa`` takes, ``scaling`` among them.

    Returns:
        [B, Q, heads, D of values], and None in the place of the attention weights.
    """
    is_plain = attention_mask is None and all(kwargs.get(name) is None for name in _NOT_PLAIN)
    is_grouped = query.shape[1] > key.shape[1] and query.shape[2] == 1
    if not (is_grouped and is_plain and query.device.type == "cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    output = F.scaled_dot_product_attention(rows, key, value, scale=kwargs.get("scaling"))
    return output.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(ROLLOUT_ATTENTION, rollout_attention_forward)
AttentionMaskInterface.register(ROLLOUT_ATTENTION, sdpa_mask)
