"""Attention over a packed trie, registered with transformers under the names of ``IMPLEMENTATIONS``.

A model with one of them behaves as with ``sdpa`` until a forward is given the keyword ``packed`` (a
:class:`PackedLayout`). Then every token attends to its ancestors in the trie and to itself, within the layer's sliding
window counted in positions. The implementation stays on the model, because gradient checkpointing calls it again in
the backward pass.

There are two ways to compute it: block by block, with scaled dot-product attention or, in bfloat16 on a processor, with
matrix products; and as one kernel, flex_attention.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpd.packing.kernels import flex, products
from vpd.packing.layout import PackedLayout

PackedKernel: TypeAlias = Literal["blocks", "flex"]

IMPLEMENTATIONS: dict[PackedKernel, str] = {"blocks": "vpd_packed_blocks", "flex": "vpd_packed_flex"}


def enable_packed_attention(model: PreTrainedModel, kernel: PackedKernel = "blocks") -> None:
    """Set the packed attention on the model, for good. Ask :func:`packable` first.

    Args:
        model: a causal language model.
        kernel: how it is computed: ``blocks``, or ``flex``, whose backward pass needs CUDA.

    Raises:
        ValueError: the model does not take its attention from transformers' interface.
    """
    model.set_attn_implementation(IMPLEMENTATIONS[kernel])
    if model.config.get_text_config()._attn_implementation != IMPLEMENTATIONS[kernel]:
        raise ValueError(
            f"{type(model).__name__} does not take its attention function from transformers' AttentionInterface, so "
            "its batches cannot be packed. Run it unpacked (share_prefixes=False)."
        )


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed: PackedLayout | None = None,
    kernel: PackedKernel = "blocks",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; ``packed`` selects attention over segments.

    Args:
        module: the attention layer.
        query: [1, heads, T, D].
        key: [1, key heads, T, D].
        value: [1, key heads, T, D of values].
        attention_mask: not read when ``packed`` is given.
        dropout: probability of dropping an attention weight.
        scaling: factor on the scores; 1 / sqrt(D) by default.
        packed: the layout of the T packed tokens, or None for what ``sdpa`` does.
        kernel: see :func:`enable_packed_attention`.
        kwargs: ``sliding_window`` among them: positions a token sees back, itself included; None for all.

    Returns:
        [1, T, heads, D of values], and None in the place of the attention weights.

    Raises:
        ValueError: the layer wants what packed attention does not compute, or the batch is not one packed row.
    """
    if packed is None:
        _refuse_lost_layout(query, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unsupported(module, query, key, packed, kwargs)

    window = kwargs.get("sliding_window")
    if kernel == "flex":
        if packed.token_count < len(packed.trie.tokens):
            raise ValueError("flex_attention takes no keys and values of another pass here: pack without `behind`.")
        if dropout:
            raise ValueError(
                "flex_attention has no dropout: set the model's attention_dropout to 0, or take the blocks."
            )
        mask = packed.block_mask(window, query.device)
        return flex.attend(query[0], key[0], value[0], mask, scaling).transpose(0, 1).unsqueeze(0), None

    if torch.is_autocast_enabled(query.device.type):
        # As it would for each block.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads, key_heads = query.shape[1], key.shape[1]
    rows = heads // key_heads
    all_keys, all_values = packed.with_known(module, key[0], value[0])
    packed.keep(module, all_keys, all_values)
    if products.can_multiply(query, all_keys, all_values, dropout):
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        queries, keys, values = (tensor.transpose(0, 1) for tensor in (query[0], all_keys, all_values))
        tiling = packed.tiling(window, heads, key_heads)
        return products.attend(queries, keys, values, tiling, scale, packed.workspace).unsqueeze(0), None
    # The query heads of a key head become rows of one matrix, so that keys and values are not repeated for each.
    folded = query[0].unflatten(0, (key_heads, rows)).transpose(1, 2).flatten(1, 2)
    outputs = _attend(folded, all_keys, all_values, packed, rows, window, dropout, scaling)
    output = outputs.unflatten(1, (packed.token_count, rows))
    return output.permute(1, 0, 2, 3).flatten(1, 2).unsqueeze(0), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedLayout,
    rows: int,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """[key heads, T * rows, D of values], block by block."""
    plan = packed.plan(window)
    masks = packed.masks(window, rows, query.dtype, query.device)
    # One split and one cat a block: their backward passes are a cat and a split, where slices would each make a
    # gradient of full size.
    queries = query.split([block.query_count * rows for block in plan.blocks], dim=1)
    key_pieces, value_pieces = key.split(plan.piece_sizes, dim=1), value.split(plan.piece_sizes, dim=1)
    outputs = []
    for block, block_query, pieces, mask in zip(plan.blocks, queries, plan.block_pieces, masks, strict=True):
        block_key = _gather(key_pieces, pieces)
        block_value = _gather(value_pieces, pieces)
        if block.is_causal:
            unfolded = block_query.unflatten(1, (block.query_count, rows)).transpose(1, 2).flatten(0, 1)
            output = F.scaled_dot_product_attention(
                unfolded[None],
                block_key[None],
                block_value[None],
                dropout_p=dropout,
                is_causal=True,
                scale=scaling,
                enable_gqa=rows > 1,
            )[0]
            output = output.unflatten(0, (-1, rows)).transpose(1, 2).flatten(1, 2)
        else:
            output = F.scaled_dot_product_attention(
                block_query[None], block_key[None], block_value[None], attn_mask=mask, dropout_p=dropout, scale=scaling
            )[0]
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _gather(pieces: tuple[Tensor, ...], indices: tuple[int, ...]) -> Tensor:
    return pieces[indices[0]] if len(indices) == 1 else torch.cat([pieces[i] for i in indices], dim=1)


def _refuse_unsupported(
    module: nn.Module, query: Tensor, key: Tensor, packed: PackedLayout, kwargs: dict[str, Any]
) -> None:
    for name, meaning in (("softcap", "soft-capped scores"), ("s_aux", "attention sinks"), ("position_bias", "a bias")):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} passes `{name}` ({meaning}), which packed attention does not compute. "
                "Run this model unpacked (share_prefixes=False)."
            )
    if "sliding_window" not in kwargs and _config_has_window(module):
        raise ValueError(
            f"{type(module).__name__} has a sliding window but does not hand it to its attention function, so packed "
            "attention cannot apply it. Run this model unpacked (share_prefixes=False)."
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__} is not causal; packed attention is. Run this model unpacked.")
    if query.shape[0] != 1 or query.shape[2] != packed.token_count or key.shape[2] != packed.token_count:
        raise ValueError(
            f"A packed batch of {packed.token_count} tokens is one row without a cache, but queries came as "
            f"{tuple(query.shape)} and keys as {tuple(key.shape)}. Pass input_ids of shape [1, T] and use_cache=False."
        )


def _config_has_window(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    is_sliding = layer_types is None or layer_types[getattr(module, "layer_idx", 0)] == "sliding_attention"
    return is_sliding and bool(getattr(config, "sliding_window", None))


def _refuse_lost_layout(query: Tensor, attention_mask: Tensor | None) -> None:
    """A packed batch's stand-in mask without its layout: the model drops keywords on the way to its attention."""
    if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and query.shape[2] > 1:
        raise ValueError(
            "The model did not hand the keyword `packed` on to its attention layers, so its batches cannot be packed. "
            "Run it unpacked (share_prefixes=False)."
        )


for _kernel, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, functools.partial(packed_attention_forward, kernel=_kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
