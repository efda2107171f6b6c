"""What attention needs to know of a packed batch: its blocks, how to gather their keys, and their masks; or one mask
for a kernel that takes all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from vpd.packing.kernels import flex
from vpd.packing.kernels.blocks import Block, allowed_pairs, partition
from vpd.packing.kernels.products import Workspace
from vpd.packing.kernels.tiles import Tiling, make_tiling
from vpd.packing.trie import Trie


@dataclass(frozen=True)
class BlockPlan:
    """The blocks of one window, over keys and values that are split once into pieces.

    Attributes:
        blocks: in packed order; their queries cover every token that is computed once.
        piece_sizes: sizes of the pieces along the token axis; their sum is that of all tokens, known ones included.
        block_pieces: for each block, the pieces that make up its keys, in order.
    """

    blocks: list[Block]
    piece_sizes: list[int]
    block_pieces: list[tuple[int, ...]]


@dataclass(frozen=True)
class Known:
    """Tokens of a trie whose keys and values are another pass's.

    Attributes:
        lender: the layout of that pass.
        mask: [T] bool, which tokens; with a token all its ancestors.
        runs: all tokens in order as runs, each whether it is known and where it starts and stops, among the lender's
            tokens or among those computed here.
    """

    lender: PackedLayout
    mask: np.ndarray
    runs: list[tuple[bool, int, int]]

    def put_together(self, lent: Tensor, computed: Tensor) -> Tensor:
        """All tokens' keys or values [key heads, T, D], from the lender's and those computed here."""
        lent = lent.to(computed.dtype)
        # Laid out token by token, as attention's inputs are.
        by_token = {True: lent.transpose(0, 1), False: computed.transpose(0, 1)}
        return torch.cat([by_token[known][start:stop] for known, start, stop in self.runs]).transpose(0, 1)


class PackedLayout:
    """The segments of one packed batch, handed through the model to its attention layers as the keyword ``packed``.

    Plans and masks are made at first use and kept, one for each sliding window (and head grouping, dtype, device)
    of the model's layers: all layers and gradient checkpointing's second pass share them.

    Args:
        trie: the tokens, known ones included.
        known: what another pass has computed of them; None for nothing.
        lends: whether other layouts will ask for this pass's keys and values.
        scored: [n] of the T tokens, those whose last hidden states are read, ascending; None for all.
    """

    def __init__(
        self, trie: Trie, known: Known | None = None, lends: bool = False, scored: Tensor | None = None
    ) -> None:
        self.trie = trie
        self.scored = scored
        self._known = known
        self._kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] | None = {} if lends else None
        self._taken: Counter[nn.Module] = Counter()
        self._plans: dict[int | None, BlockPlan] = {}
        self._masks: dict[tuple, list[Tensor | None]] = {}
        self._tilings: dict[tuple, Tiling] = {}
        self._block_masks: dict[tuple, BlockMask] = {}
        self.workspace = Workspace()

    @property
    def token_count(self) -> int:
        """T: the packed tokens that are computed, those that fill the batch up included."""
        return len(self.trie.tokens) - (0 if self._known is None else int(self._known.mask.sum()))

    def with_known(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [key heads, T, D] of one layer, with those of the known tokens in their places.

        Raises:
            ValueError: the lender has none.
        """
        if self._known is None:
            return key, value
        lent = (self._known.lender._kept or {}).get(layer)
        if not lent:
            raise ValueError(
                "The batch that is to lend its keys and values has none: it was packed without `lends`, has not been "
                "run, or was told to forget."
            )
        # A layer may run several times in a pass.
        keys, values = lent[self._taken[layer] % len(lent)]
        self._taken[layer] += 1
        return self._known.put_together(keys, key), self._known.put_together(values, value)

    def keep(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep a layer's keys and values [key heads, T, D], without their gradient, if this batch lends them."""
        if self._kept is not None:
            self._kept.setdefault(layer, []).append((key.detach(), value.detach()))

    def give_away(self) -> Iterator[tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
        """Each layer with the keys and values [key heads, T, D] that are kept of each time it ran; then nothing is."""
        while self._kept:
            yield self._kept.popitem()

    def forget(self) -> None:
        """Keep no keys and values from now on, so that gradient checkpointing's second pass keeps none either."""
        self._kept = None

    def plan(self, window: int | None) -> BlockPlan:
        """The blocks for layers that see ``window`` positions back (itself included), or everything for None."""
        window = self._effective(window)
        if window not in self._plans:
            known = None if self._known is None else self._known.mask
            self._plans[window] = _plan(partition(self.trie, window, known=known), len(self.trie.tokens))
        return self._plans[window]

    def tiling(self, window: int | None, heads: int, key_heads: int) -> Tiling:
        """The tiles for :func:`vpd.packing.kernels.products.attend`, of layers with so many heads."""
        key = (self._effective(window), heads, key_heads)
        if key not in self._tilings:
            known = None if self._known is None else self._known.mask
            self._tilings[key] = make_tiling(self.trie, *key, known)
        return self._tilings[key]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The mask for flex_attention; see :func:`vpd.packing.kernels.flex.make_block_mask`."""
        key = (self._effective(window), device)
        if key not in self._block_masks:
            self._block_masks[key] = flex.make_block_mask(self.trie, *key)
        return self._block_masks[key]

    def _effective(self, window: int | None) -> int | None:
        """None for a window that no sequence outgrows."""
        return None if window is None or window > int(self.trie.depth.max(initial=-1)) else window

    def masks(
        self, window: int | None, query_rows: int, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor | None]:
        """For each block of the plan an additive mask [Q * query_rows, K], or None where the causal flag is enough.

        Each query's row stands ``query_rows`` times in a row, for the query heads that share a key head.
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
                masks.append(_additive(allowed_pairs(self.trie, queries, keys, window), query_rows, dtype, device))
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
