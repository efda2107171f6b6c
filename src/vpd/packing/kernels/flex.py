"""Attention over a packed trie as one kernel, ``flex_attention``: for GPUs, where a call for each block would cost more
than what is in it.

A token sees what stands before it and whose subtree it is in, so that the mask needs two numbers of each token and is
never held as tokens x tokens. Blocks of 128 x 128 pairs without an allowed one are left out, and those with nothing
else are computed without the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vpd.packing.trie import Trie

BLOCK_SIZE = 128
"""Tokens are padded to a multiple of it, which the kernels ask for; it leaves them fewer shapes to compile for, too."""


def make_block_mask(trie: Trie, window: int | None, device: torch.device) -> BlockMask:
    """Which of the packed tokens see which, padding included: padding sees itself alone, and nobody sees it.

    Args:
        trie: the packed tokens.
        window: how many positions back a token sees, itself included; None for all.
        device: where the attention is computed.
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

    # A strip of blocks at a time: transformers' and PyTorch's helpers make all pairs at once.
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
    """For each row of blocks [n, n] how many are chosen, and which, those first: [1, 1, n] and [1, 1, n, n]."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Attention of T packed tokens.

    Compiled on CUDA, at the first call. On other devices the kernel's definition in plain operations, which has no
    backward pass there: slow, and meant for tests.

    Args:
        query: [heads, T, D]; converted to the dtype of the values, since autocast leaves queries and keys in float32
            behind rotary embeddings.
        key: [key heads, T, D]; converted too.
        value: [key heads, T, D of values].
        mask: from :func:`make_block_mask`.
        scaling: factor on the scores; 1 / sqrt(D) by default.

    Returns:
        [heads, T, D of values].
    """
    count = query.shape[1]
    padding = (0, 0, 0, mask.seq_lengths[0] - count)
    kernel = _compiled() if query.is_cuda else flex_attention
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
    # With fullgraph, more variants than dynamo may compile are an error; else it would make all pairs from then on.
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True, fullgraph=True))
