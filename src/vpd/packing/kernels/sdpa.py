"""Attention of a packed batch block by block, each a call of PyTorch's scaled dot-product attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vpd.packing.kernels.blocks import Block, allowed_pairs, partition
from vpd.packing.layout import PackedLayout, Segments


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of one window, over keys and values that are split once into pieces.

    Attributes:
        blocks: The blocks in packed order; their queries cover each computed token once.
        piece_sizes: The sizes of the pieces along the token axis; they sum to all tokens, known ones included.
        block_pieces: For each block, the pieces that make up its keys, in order.
    """

    blocks: list[Block]
    piece_sizes: list[int]
    block_pieces: list[tuple[int, ...]]


class Prepared:
    """The plans and masks of one packed batch, made at first use: one for each window, head grouping, dtype and device
    of the model's layers.

    Args:
        segments: The segments of the batch.
    """

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._plans: dict[int | None, BlockPlan] = {}
        self._masks: dict[tuple, list[Tensor | None]] = {}

    def plan(self, window: int | None) -> BlockPlan:
        """The blocks for layers that see ``window`` positions back (itself included), or everything for None."""
        window = self._segments.effective(window)
        if window not in self._plans:
            trie = self._segments.trie
            self._plans[window] = _plan(partition(trie, window, known=self._segments.known), len(trie.tokens))
        return self._plans[window]

    def masks(
        self, window: int | None, query_rows: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor | None]:
        """For each block of the plan an additive mask [Q * query_rows, K], or None where the causal flag is enough.

        Each query's row is repeated ``query_rows`` times, for the query heads that share a key head.
        """
        key = (window, query_rows, dtype, device)
        if key in self._masks:
            return self._masks[key]
        blocks = self.plan(window).blocks
        chains = [block for block in blocks if block.is_chain and not block.is_causal]
        # Whether a chain's query sees a key depends on their distance only, so one mask, aligned at its lower right
        # corner, serves every chain as a view. Long sequences then need no mask of their own.
        rows = max((block.query_count for block in chains), default=0)
        columns = max((block.key_count for block in chains), default=0)
        distance = np.arange(columns - rows, columns, dtype=np.int32)[:, None] - np.arange(columns, dtype=np.int32)
        chain_allowed = (distance >= 0) & (distance < (columns if window is None else window))
        chain_mask = _additive(chain_allowed, query_rows, dtype, device)

        masks: list[Tensor | None] = []
        for block in blocks:
            if block.is_causal:
                masks.append(None)
            elif block.is_chain:
                masks.append(chain_mask[(rows - block.query_count) * query_rows :, columns - block.key_count :])
            else:
                queries = np.arange(block.start, block.stop)
                keys = np.concatenate([np.arange(start, stop) for start, stop in block.key_ranges])
                allowed = allowed_pairs(self._segments.trie, queries, keys, window)
                masks.append(_additive(allowed, query_rows, dtype, device))
        self._masks[key] = masks
        return masks


def _additive(allowed: np.ndarray, query_rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where allowed and -inf elsewhere: kernels add it as it is, a bool mask they would convert in every layer."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
    mask.masked_fill_(torch.from_numpy(~allowed).to(device), float("-inf"))
    return mask.repeat_interleave(query_rows, dim=0)


def _plan(blocks: list[Block], token_count: int) -> BlockPlan:
    ranges = [key_range for block in blocks for key_range in block.key_ranges]
    bounds = sorted({0, token_count, *(bound for key_range in ranges for bound in key_range)})
    piece_at = {bound: piece for piece, bound in enumerate(bounds)}
    block_pieces = [
        tuple(piece for start, stop in block.key_ranges for piece in range(piece_at[start], piece_at[stop]))
        for block in blocks
    ]
    return BlockPlan(blocks, [right - left for left, right in pairwise(bounds)], block_pieces)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attention of all blocks; for the arguments and the result see :func:`vpd.packing.kernels.attend`."""
    key_heads = key.shape[0]
    rows = query.shape[0] // key_heads
    prepared = layout.prepared(Prepared)
    plan = prepared.plan(window)
    masks = prepared.masks(window, rows, query.dtype, query.device)
    # The query heads of a key head become rows of one matrix, so that keys and values are not repeated for each.
    folded = query.unflatten(0, (key_heads, rows)).transpose(1, 2).flatten(1, 2)
    # There is one split and one cat for a block: their backward passes are a cat and a split, where slices would each
    # make a gradient of full size.
    queries = folded.split([block.query_count * rows for block in plan.blocks], dim=1)
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
    output = torch.cat(outputs, dim=1).unflatten(1, (layout.token_count, rows))
    return output.permute(1, 0, 2, 3).flatten(1, 2)


def _gather(pieces: tuple[Tensor, ...], indices: tuple[int, ...]) -> Tensor:
    return pieces[indices[0]] if len(indices) == 1 else torch.cat([pieces[i] for i in indices], dim=1)
