"""Attention for decoding, registered with transformers as ``vpd_rollout``.

It is transformers' own attention, except in two cases. In a decoding step on the CPU, PyTorch's kernel takes the query
heads of a key head one by one. For a single query in bfloat16, on a CPU without AMX, that takes several times as long
as one product with these queries as rows of a matrix (transformers makes rows of them itself where there is a mask).
And sequences that share their prompt read its keys and values once: their queries are rows of one matrix too, and that
result is joined with the attention to each sequence's own tokens. A packed batch is computed as in training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpd.device import is_cpu
from vpd.packing import packed_attention_forward
from vpd.rollout.kv_cache import PreallocatedLayer, layer_of

ROLLOUT_ATTENTION = "vpd_rollout"
_NOT_PLAIN = ("position_bias", "softcap", "s_aux", "cache")


def rollout_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function with transformers' signature.

    Args:
        module: The attention layer.
        query: The queries [B, heads, Q, D].
        key: The keys [B, key heads, T, D]; where sequences share prompts, those of the tokens after the prompt.
        value: The values [B, key heads, T, D of values], likewise.
        attention_mask: The mask that ``sdpa`` takes.
        kwargs: The further arguments of ``sdpa``, ``scaling`` among them; and ``packed``, the layout of a packed batch.

    Returns:
        The outputs [B, Q, heads, D of values], and None in the place of the attention weights.

    Raises:
        RuntimeError: Sequences that share prompts are run in another way than one token at a time without a mask.
    """
    if kwargs.get("packed") is not None:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    is_plain = is_cpu(query) and all(kwargs.get(name) is None for name in _NOT_PLAIN)
    layer = layer_of(key, value)
    is_step = query.shape[2] == 1 and is_plain and attention_mask is None
    if layer is not None and layer.groups is not None:
        if not is_step:
            raise RuntimeError("Sequences that share their prompts must decode one token at a time, without a mask.")
        output = _attend_in_groups(_rows(query, key), key, value, layer, kwargs.get("scaling"))
    elif is_step and query.shape[1] > key.shape[1]:
        output = F.scaled_dot_product_attention(_rows(query, key), key, value, scale=kwargs.get("scaling"))
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.flatten(1, 2).unsqueeze(1), None


def _rows(query: Tensor, key: Tensor) -> Tensor:
    """The R query heads of each key head as rows, [B, key heads, R, D]."""
    return query[:, :, 0].unflatten(1, (key.shape[1], -1))


def _attend_in_groups(
    rows: Tensor, key: Tensor, value: Tensor, layer: PreallocatedLayer, scaling: float | None
) -> Tensor:
    """Attention to the shared prompts and to each row's own tokens, joined by their weights."""
    assert layer.groups is not None
    assert layer.prompt_states is not None
    own, own_weight = _attend(rows, key, value, scale=scaling)
    gathered = layer.groups.gather(rows)
    shared, shared_weight = _attend(gathered, *layer.prompt_states, attn_mask=layer.groups.mask, scale=scaling)
    shared, shared_weight = layer.groups.scatter(shared), layer.groups.scatter(shared_weight)
    # A weight is the logarithm of the sum of exponentials that the softmax has divided by.
    share = torch.sigmoid(own_weight - shared_weight).unsqueeze(-1)
    return torch.lerp(shared.float(), own.float(), share).to(rows.dtype)


# F.scaled_dot_product_attention calls this function on a CPU; only this one also returns the weights.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


AttentionInterface.register(ROLLOUT_ATTENTION, rollout_attention_forward)
AttentionMaskInterface.register(ROLLOUT_ATTENTION, sdpa_mask)
