"""Cuts the attention of a packed trie into tiles for matrix products, and puts tiles of like size together.

A tile is some queries and the keys that they ask for. Each branch has tiles of its own, whose keys are gathered row by
row, so that it asks for its own ancestors alone; and many tiles are multiplied at a time, so that they share what a
call costs. In such a batch tiles are filled up to the size of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vpd.packing.kernels.blocks import Block, allowed_pairs, partition
from vpd.packing.trie import Trie

BATCH_SCORES = 2**20
"""Scores of a batch of several tiles, all heads together: 4 MB in float32. Smaller ones have slower products, larger
ones leave the cache that cores share."""

TILE_SCORES = 2**22
"""Scores of one tile: smaller ones of many keys would gather these for few queries at a time."""

SUM_ROWS = 2**18
"""Rows of keys that batches gather before their gradients are summed, which exist in bfloat16 until then."""

KEYS_MULTIPLE_OF = 16
"""Rows of such a length have the fastest softmax: on an EPYC it takes 0.22 ns a score in place of 0.35."""

# The cost of a batch of n tiles of Q queries and K keys in units of a query-key pair: n K (Q + KEY_COST) + BATCH_COST,
# and what a branch's being a block of its own costs in padding. Measured on an EPYC, forward and backward; twice as
# much makes no difference beyond noise.
KEY_COST = 8
BATCH_COST = 8192
TILE_COST = 512

_HIDDEN = -1e30
"""Added to a score that is not to count. Finite, for rows that stand for no query may have no others."""


@dataclass(frozen=True)
class Tile:
    """Queries of a block, and the block's keys up to the last of them.

    Attributes:
        start, stop: their place among the tokens that are computed.
        keys: [K] indices of packed tokens, ascending; the last ones are the queries themselves.
        hidden: [stop - start, at most K] bool, which of the last keys a query does not see; it sees all before them.
            None for queries without a branch among them, where a pair's distance says it.
    """

    start: int
    stop: int
    keys: np.ndarray
    hidden: np.ndarray | None

    @property
    def query_count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class TileBatch:
    """n tiles as if each had Q queries and K keys: where it has fewer, padding stands before them.

    Attributes:
        query_rows: [n * heads * Q] rows of the queries [tokens * heads, D].
        key_rows: [n * key heads * K] rows of the keys [all tokens * key heads, D].
        mask: [n or 1, 1, Q, at most K] float32, added to the scores of the last keys.
        key_padding: [n, 1, 1, at most K] float32, added to the scores of the first keys; None without padding.
        query_padding: which of ``query_rows`` are padding; None without.
        shape: n, Q and K.
    """

    query_rows: Tensor
    key_rows: Tensor
    mask: Tensor
    key_padding: Tensor | None
    query_padding: Tensor | None
    shape: tuple[int, int, int]

    @property
    def matrices(self) -> int:
        """n * key heads."""
        return len(self.key_rows) // self.shape[2]


@dataclass(frozen=True)
class KeySum:
    """How to sum what some batches have made for the rows that they gathered.

    Attributes:
        batches: the batches.
        places: where each row of the keys stands among their ``key_rows``, one row's places after another's.
        offsets: [all tokens * key heads] where those of each row begin.
    """

    batches: list[TileBatch]
    places: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Tiling:
    """All tiles of a packed batch.

    Attributes:
        sums: all batches of tiles, in groups whose gradients of keys are summed together.
        query_places: [T * heads] where each row of the queries stands among all batches' ``query_rows``.
    """

    sums: list[KeySum]
    query_places: Tensor

    @property
    def batches(self) -> list[TileBatch]:
        return [batch for part in self.sums for batch in part.batches]


def make_tiling(trie: Trie, window: int | None, heads: int, key_heads: int, known: np.ndarray | None = None) -> Tiling:
    """The tiles of a packed batch for layers with so many heads.

    Args:
        trie: the packed tokens.
        window: how many positions back a token sees, itself included; None for all.
        heads, key_heads: of a layer.
        known: [tokens] bool, which no tile asks for; see :func:`vpd.packing.kernels.blocks.partition`.
    """
    blocks = partition(trie, window, known=known, costs=(KEY_COST, TILE_COST))
    return batch_tiles(cut_into_tiles(blocks, trie, window, heads), len(trie.tokens), window, heads, key_heads)


def cut_into_tiles(blocks: Sequence[Block], trie: Trie, window: int | None, heads: int) -> list[Tile]:
    """Cut the blocks' queries into tiles of like size, of at most ``TILE_SCORES`` or of one query.

    A tile's keys end at its last query, whose token sees none behind itself, so that more tiles make fewer scores.

    Args:
        blocks: in packed order; they cover every token that is computed.
        trie: the tokens that the blocks are of.
        window: how many positions back a token sees, itself included; None for all.
        heads: query heads, whose scores a tile holds together.
    """
    tiles, start = [], 0
    for block in blocks:
        keys = np.concatenate([np.arange(*key_range) for key_range in block.key_ranges])
        count, before = block.query_count, block.key_count - block.query_count
        # n tiles make about Q^2 / 2n pairs that no query may see, and gather about n (before + Q / 2) keys. With this
        # n both cost least together.
        least = round(count / math.sqrt(2 * KEY_COST * (before + count / 2)))
        first = 0
        while first < count:
            # Scores a head: queries * (the keys before them + queries).
            seen = before + first
            most = int((math.sqrt(seen**2 + 4 * TILE_SCORES / heads) - seen) / 2)
            last = first + max(1, min(math.ceil((count - first) / max(1, least)), most))
            # In a chain, windows of later queries begin later.
            earliest = max(0, seen - window + 1) if block.is_chain and window is not None else 0
            tile_keys, hidden = keys[earliest : before + last], None
            if not block.is_chain:
                queries = np.arange(block.start + first, block.start + last)
                hidden = _hidden(~allowed_pairs(trie, queries, tile_keys, window))
            tiles.append(Tile(start + first, start + last, tile_keys, hidden))
            first, least = last, least - 1
        start += count
    return tiles


def _hidden(hidden: np.ndarray) -> np.ndarray:
    """[Q, K] bool without the first keys, those that all queries see."""
    partly = np.flatnonzero(hidden.any(0))
    return hidden[:, partly[0] if len(partly) else hidden.shape[1] :]


def _hidden_in_chain(queries: int, keys: int, window: int | None) -> np.ndarray:
    """Likewise for the last ``queries`` of a chain of so many keys: [queries, at most keys]."""
    width = queries if window is None or keys <= window else keys
    distance = np.arange(width - queries, width)[:, None] - np.arange(width)
    return (distance < 0) | (distance >= (width if window is None else window))


def batch_tiles(tiles: Sequence[Tile], token_count: int, window: int | None, heads: int, key_heads: int) -> Tiling:
    """The tiles in batches of like size, so that padding and calls cost least, of at most ``BATCH_SCORES`` or of one
    tile.

    Args:
        tiles: they cover every token that is computed.
        token_count: of all tokens, whose keys they ask for.
        window: how many positions back a token sees, itself included; None for all.
        heads, key_heads: of the layer.
    """
    tiles = sorted(tiles, key=lambda tile: (len(tile.keys), tile.query_count))
    best_cost, best_start = [0.0], [0]
    for stop in range(1, len(tiles) + 1):
        keys, queries, costs = _rounded_up(len(tiles[stop - 1].keys)), 0, []
        for start in range(stop - 1, -1, -1):
            queries, count = max(queries, tiles[start].query_count), stop - start
            if count > 1 and count * queries * keys * heads > BATCH_SCORES:
                break
            costs.append((best_cost[start] + count * keys * (queries + KEY_COST) + BATCH_COST, start))
        cost, start = min(costs)
        best_cost.append(cost)
        best_start.append(start)
    made, stop, masks = [], len(tiles), {}
    while stop:
        made.append(_batch(tiles[best_start[stop] : stop], window, heads, key_heads, masks))
        stop = best_start[stop]

    sums, first = [], 0
    while first < len(made):
        last, count = first + 1, len(made[first][2])
        while last < len(made) and count + len(made[last][2]) <= SUM_ROWS:
            count += len(made[last][2])
            last += 1
        places, ordered = _places([key_rows for _, _, key_rows in made[first:last]])
        offsets = np.searchsorted(ordered, np.arange(key_heads * token_count))
        sums.append(KeySum([batch for batch, _, _ in made[first:last]], _index(places), _index(offsets)))
        first = last
    places, _ = _places([query_rows for _, query_rows, _ in made])
    return Tiling(sums, _index(places))


def _places(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where what is not padding, -1, stands in the chained ``rows``, in the rows' ascending order; and these rows."""
    chained = np.concatenate(rows)
    places = np.argsort(chained, kind="stable")[np.count_nonzero(chained < 0) :]
    return places, chained[places]


def _batch(
    tiles: Sequence[Tile],
    window: int | None,
    heads: int,
    key_heads: int,
    masks: dict[tuple[int, ...], Tensor],
) -> tuple[TileBatch, np.ndarray, np.ndarray]:
    """The batch, and its rows of queries and of keys, -1 for padding; ``masks`` are chains', by shape."""
    n, queries, most_keys = len(tiles), max(tile.query_count for tile in tiles), max(len(tile.keys) for tile in tiles)
    keys = _rounded_up(most_keys)
    query_tokens, key_tokens = np.full((n, queries), -1), np.full((n, keys), -1)
    for i, tile in enumerate(tiles):
        query_tokens[i, queries - tile.query_count :] = np.arange(tile.start, tile.stop)
        key_tokens[i, keys - len(tile.keys) :] = tile.keys
    if all(tile.hidden is None for tile in tiles):
        # Aligned at its lower right, as tiles stand here, a chain's mask holds for shorter ones too.
        hidden = _hidden_in_chain(queries, most_keys, window)
        if hidden.shape not in masks:
            masks[hidden.shape] = _additive(hidden)[None, None]
        mask = masks[hidden.shape]
    else:
        parts = [_hidden_in_chain(tile.query_count, len(tile.keys), window) if tile.hidden is None else tile.hidden
                 for tile in tiles]  # fmt: skip
        together = np.zeros((n, queries, max(part.shape[1] for part in parts)), dtype=bool)
        for i, part in enumerate(parts):
            together[i, queries - part.shape[0] :, together.shape[2] - part.shape[1] :] = part
        mask = _additive(together)[:, None]
    query_rows, key_rows = _rows(query_tokens, heads), _rows(key_tokens, key_heads)
    is_padding = key_tokens < 0
    query_padding = np.flatnonzero(query_rows < 0)
    batch = TileBatch(
        # Any row in the place of padding.
        query_rows=_index(query_rows.clip(min=0)),
        key_rows=_index(key_rows.clip(min=0)),
        mask=mask,
        key_padding=_additive(is_padding[:, is_padding.any(0)])[:, None, None] if is_padding.any() else None,
        query_padding=torch.from_numpy(query_padding) if len(query_padding) else None,
        shape=(n, queries, keys),
    )
    return batch, query_rows, key_rows


def _rounded_up(keys: int) -> int:
    return math.ceil(keys / KEYS_MULTIPLE_OF) * KEYS_MULTIPLE_OF


def _rows(tokens: np.ndarray, heads: int) -> np.ndarray:
    """[n, count] tokens, -1 for none, as [n * heads * count] rows of [tokens * heads]."""
    rows = tokens[:, None] * heads + np.arange(heads)[:, None]
    return np.where(tokens[:, None] < 0, -1, rows).ravel()


def _index(rows: np.ndarray) -> Tensor:
    """As int32, which numbers of rows of one batch do not outgrow."""
    return torch.from_numpy(rows.astype(np.int32, casting="same_kind"))


def _additive(hidden: np.ndarray) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), _HIDDEN)
