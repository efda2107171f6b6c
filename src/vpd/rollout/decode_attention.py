"""Attention of the network that samples, registered with transformers as ``vpd_rollout``.

transformers' own, but for decoding steps on the processor. There PyTorch's kernel takes the query heads of a key head
one by one, which for a single query of bfloat16, on a processor without AMX, takes several times as long as the same
queries as rows of one matrix (transformers makes rows of them itself where there is a mask). And sequences that share
their prompt read its keys and values once: their queries are rows of one matrix too, whose result is joined to that of
what each sequence has written. A packed batch is computed as in training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpd.packing import packed_attention_forward
from vpd.rollout.kv_cache import PreallocatedLayer, layer_of

ROLLOUT_ATTENTION = "vpd_rollout"
_NOT_PLAIN = ("position_bias", "softcap", "s_aux", "cache")


def rollout_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature.

    Args:
        module: the attention layer.
        query: [B, heads, Q, D].
        key: [B, key heads, T, D]; where sequences share prompts, of what they have written.
        value: [B, key heads, T, D of values]; likewise.
        attention_mask: what ``sdpa`` takes.
        kwargs: what ``sdpa`` takes, ``scaling`` among them; ``packed``, the layout of a packed batch.

    Returns:
        [B, Q, heads, D of values], and None in the place of the attention weights.
    """
    if kwargs.get("packed") is not None:
        return packed_attention_forward(module, query, key, value, attention_mask, **kwargs)
    is_plain = query.device.type == "cpu" and all(kwargs.get(name) is None for name in _NOT_PLAIN)
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
    """[B, key heads, R, D], the R query heads of a key head as rows."""
    return query[:, :, 0].unflatten(1, (key.shape[1], -1))


def _attend_in_groups(
    rows: Tensor, key: Tensor, value: Tensor, layer: PreallocatedLayer, scaling: float | None
) -> Tensor:
    """Attention to the prompts that rows share, and to what each has written, joined by how much either weighs."""
    assert layer.groups is not None
    assert layer.prompt_states is not None
    own, own_weight = _attend(rows, key, value, scale=scaling)
    gathered = layer.groups.gather(rows)
    shared, shared_weight = _attend(gathered, *layer.prompt_states, attn_mask=layer.groups.mask, scale=scaling)
    shared, shared_weight = layer.groups.scatter(shared), layer.groups.scatter(shared_weight)
    # Weights are logarithms of the sums of exponentials that either softmax has divided by.
    share = torch.sigmoid(own_weight - shared_weight).unsqueeze(-1)
    return torch.lerp(shared.float(), own.float(), share).to(rows.dtype)


# What F.scaled_dot_product_attention calls on a processor; it alone gives the weights too.
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


AttentionInterface.register(ROLLOUT_ATTENTION, rollout_attention_forward)
AttentionMaskInterface.register(ROLLOUT_ATTENTION, sdpa_mask)
