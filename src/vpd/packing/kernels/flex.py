"""Attention over a packed trie as one kernel, ``flex_attention``: for GPUs, where launching a kernel for each block
would take longer than the block.

A token sees another one that stands before it and whose subtree it is in. The mask therefore needs two numbers for each
token and is never held as tokens x tokens. Blocks of 128 x 128 pairs without an allowed pair are left out, and those
with allowed pairs only are computed without the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vpd.device import is_cuda
from vpd.packing.layout import Segments
from vpd.packing.trie import Trie

BLOCK_SIZE = 128
"""Tokens are padded to a multiple of this number, as the kernels require; they also compile for fewer shapes then."""


class Prepared:
    """The masks of one packed batch, made at first use: one for each window and device of the model's layers.

    Args:
        segments: The segments of the batch.
    """

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._masks: dict[tuple[int | None, torch.device], BlockMask] = {}

    def mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The mask for layers that see ``window`` positions back; see :func:`make_block_mask`."""
        key = (self._segments.effective(window), device)
        if key not in self._masks:
            self._masks[key] = make_block_mask(self._segments.trie, *key)
        return self._masks[key]


def make_block_mask(trie: Trie, window: int | None, device: torch.device) -> BlockMask:
    """The mask that says which packed tokens see which. A token of the padding sees itself alone, and no other sees it.

    Args:
        trie: The packed tokens.
        window: How many positions back a token sees, itself included; None for all.
        device: The device on which the attention is computed.
    """
    count = len(trie.tokens)
    padded = -(-count // BLOCK_SIZE) * BLOCK_SIZE
    subtree_end = torch.arange(1, padded + 1, dtype=torch.int32)
    subtree_end[:count] = torch.from_numpy(trie.subtree_end)
    depth = torch.zeros(padded, dtype=torch.int32)
    depth[:count] = torch.from_numpy(trie.depth)
    subtree_end, depth = subtree_end.to(device), depth.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    if window is None:
        allowed = sees
    else:
        reach: int = window

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(batch, head, query, key) & (depth[query] - depth[key] < reach)

    # This takes a strip of blocks at a time: transformers' and PyTorch's helpers make all pairs at once.
    index = torch.arange(padded, dtype=torch.int32, device=device)
    zero = index.new_zeros(())
    some, every = [], []
    for queries in index.split(BLOCK_SIZE):
        strip = allowed(zero, zero, queries[:, None], index[None]).unflatten(1, (-1, BLOCK_SIZE))
        some.append(strip.any(2).any(0))
        every.append(strip.all(2).all(0))
    some, every = torch.stack(some), torch.stack(every)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK_SIZE, mask_mod=allowed, seq_lengths=(padded, padded)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks [n, n]: how many are chosen [1, 1, n], and all in order, the chosen first [1, 1, n, n]."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Attention of T packed tokens.

    On CUDA it is compiled at the first call. Other devices run the kernel's definition in plain operations, which has
    no backward pass there and is slow: it is meant for tests.

    Args:
        query: The queries [heads, T, D], which are converted to the dtype of the values.
        key: The keys [key heads, T, D], which are converted likewise.
        value: The values [key heads, T, D of values].
        mask: The mask from :func:`make_block_mask`.
        scaling: The factor on the scores; 1 / sqrt(D) by default.

    Returns:
        The outputs [heads, T, D of values].
    """
    count = query.shape[1]
    padding = (0, 0, 0, mask.seq_lengths[0] - count)
    kernel = _compiled() if is_cuda(query) else flex_attention
    output = kernel(
        F.pad(query.to(value.dtype), padding)[None],
        F.pad(key.to(value.dtype), padding)[None],
        F.pad(value, padding)[None],
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return cast(Tensor, output)[0, :, :count]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Without fullgraph, dynamo would silently compute all pairs once it has compiled as many variants as it may.
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True, fullgraph=True))
