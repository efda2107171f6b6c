"""Attention over a packed trie, registered with transformers under the names of ``IMPLEMENTATIONS``.

A model with one of them behaves as with ``sdpa`` until a forward is given the keyword ``packed`` (a
:class:`PackedLayout`). Then every token attends to its ancestors in the trie and to itself, within the layer's sliding
window counted in positions. The implementation stays on the model, because gradient checkpointing calls it again in
the backward pass.

This module registers it, refuses what it does not compute, and puts the keys and values of other passes in their
places. :mod:`vpd.packing.kernels` computes it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vpd.device import PackedKernel
from vpd.packing import kernels
from vpd.packing.layout import PackedLayout

IMPLEMENTATIONS: dict[PackedKernel, str] = {"blocks": "vpd_packed_blocks", "flex": "vpd_packed_flex"}
"""The name of each kernel's attention function in transformers' AttentionInterface."""


def enable_packed_attention(model: PreTrainedModel, kernel: PackedKernel = "blocks") -> None:
    """Set the packed attention on the model, for good. Ask :func:`packable` first.

    Args:
        model: A causal language model.
        kernel: Which kernel computes it: ``blocks``, or ``flex``, whose backward pass needs CUDA.

    Raises:
        ValueError: The model does not take its attention from transformers' interface.
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
    """An attention function with transformers' signature; ``packed`` selects attention over segments.

    Args:
        module: The attention layer.
        query: The queries [1, heads, T, D].
        key: The keys [1, key heads, T, D].
        value: The values [1, key heads, T, D of values].
        attention_mask: The mask that ``sdpa`` takes; it is not read when ``packed`` is given.
        dropout: The probability of dropping an attention weight.
        scaling: The factor on the scores; 1 / sqrt(D) by default.
        packed: The layout of the T packed tokens; None makes this ``sdpa``.
        kernel: Which kernel computes it; see :func:`enable_packed_attention`.
        kwargs: The further arguments of ``sdpa``. ``sliding_window`` among them is how many positions back a token
            sees, itself included; None for all.

    Returns:
        The outputs [1, T, heads, D of values], and None in the place of the attention weights.

    Raises:
        ValueError: The layer wants what packed attention does not compute, or the batch is not one packed row.
    """
    if packed is None:
        _refuse_lost_layout(query, attention_mask)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unsupported(module, query, key, packed, kwargs)

    if torch.is_autocast_enabled(query.device.type):
        # Autocast would cast them for each of a kernel's calls.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    keys, values = key[0], value[0]
    if kernels.reuses_keys(kernel):
        keys, values = packed.with_known(module, keys, values)
        packed.keep(module, keys, values)
    elif packed.known is not None:
        raise ValueError(
            f"The kernel {kernel} does not reuse keys and values of another pass: pack the batch by itself."
        )
    output = kernels.attend(
        kernel,
        query[0],
        keys,
        values,
        packed,
        window=kwargs.get("sliding_window"),
        dropout=dropout,
        scaling=scaling,
    )
    return output.unsqueeze(0), None


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
    """Raise ValueError where a packed batch's stand-in mask comes without its layout: the model has dropped it."""
    if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and query.shape[2] > 1:
        raise ValueError(
            "The model did not hand the keyword `packed` on to its attention layers, so its batches cannot be packed. "
            "Run it unpacked (share_prefixes=False)."
        )


for _kernel, _name in IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, functools.partial(packed_attention_forward, kernel=_kernel))
    AttentionMaskInterface.register(_name, sdpa_mask)
