"""Attention kernels for packed batches, behind one function: :func:`attend`.

There are two kernels to choose from. ``flex`` is one compiled kernel, ``flex_attention``, for GPUs. ``blocks`` cuts the
batch into blocks and computes these one by one with scaled dot-product attention (:mod:`.sdpa`); in bfloat16 on a CPU
with native products of that dtype it multiplies many tiles at a time instead (:mod:`.products`).

What a kernel prepares for a batch (plans, masks, tilings, memory) is its own, and the batch's layout keeps it.
"""

from __future__ import annotations

import math

from torch import Tensor

from vpd.device import PackedKernel
from vpd.packing.kernels import flex, products, sdpa
from vpd.packing.layout import PackedLayout


def attend(
    kernel: PackedKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    *,
    window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Attention of one layer: each token attends to its ancestors in the trie and to itself.

    Args:
        kernel: Which kernel computes it.
        query: The queries [heads, T, D] of the T tokens that this pass computes.
        key: The keys [key heads, tokens, D] of all tokens of the trie, in the dtype of the queries.
        value: The values [key heads, tokens, D of values] of all tokens of the trie.
        layout: The layout of the batch.
        window: How many positions back a token sees, itself included; None for all.
        dropout: The probability of dropping an attention weight.
        scaling: The factor on the scores; 1 / sqrt(D) by default.

    Returns:
        The outputs [T, heads, D of values].

    Raises:
        ValueError: The kernel has no dropout.
    """
    if kernel == "flex":
        if dropout:
            raise ValueError(
                "flex_attention has no dropout: set the model's attention_dropout to 0, or take the blocks."
            )
        mask = layout.prepared(flex.Prepared).mask(window, query.device)
        return flex.attend(query, key, value, mask, scaling).transpose(0, 1)
    if products.can_multiply(query, key, value, dropout):
        prepared = layout.prepared(products.Prepared)
        tiling = prepared.tiling(window, query.shape[0], key.shape[0])
        scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        queries, keys, values = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return products.attend(queries, keys, values, tiling, scale, prepared.workspace)
    return sdpa.attend(query, key, value, layout, window, dropout, scaling)


def reuses_keys(kernel: PackedKernel) -> bool:
    """Whether a batch may reuse keys and values that the kernel kept of another batch's pass."""
    return kernel == "blocks"
