"""Cuts the attention of a packed trie into tiles for matrix products, and puts tiles of like size together.

A tile is some queries and the keys that they see. Each branch has tiles of its own, whose keys are gathered row by row,
so that its tiles hold its own ancestors alone. Many tiles are multiplied in one call, so that they share its cost. In
such a batch each tile is padded to the size of the largest.
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
"""The most scores of a batch of several tiles, all heads together: 4 MB in float32. Smaller batches have slower
products, larger ones do not fit the cache that cores share."""

TILE_SCORES = 2**22
"""The most scores of one tile: a smaller tile of many keys would gather them for few queries."""

SUM_ROWS = 2**18
"""How many rows of keys batches gather before their gradients are summed; until then the gradients are bfloat16."""

KEYS_MULTIPLE_OF = 16
"""The number of keys of a batch is a multiple of this number. The softmax is faster then: on an EPYC it takes 0.22 ns a
score instead of 0.35."""

# In units of a query-key pair, a batch of n tiles of Q queries and K keys costs n K (Q + KEY_COST) + BATCH_COST.
# TILE_COST is the cost in padding of a branch that is a block of its own. All are measured on an EPYC, forward and
# backward; twice as much makes no difference beyond noise.
KEY_COST = 8
BATCH_COST = 8192
TILE_COST = 512

_HIDDEN = -1e30
"""The number that is added to a score that must not count. It is finite, because a row of the padding may have no other
scores."""


@dataclass(frozen=True)
class Tile:
    """Queries of a block, and the block's keys up to the last of them.

    Attributes:
        start: The first query, as an index among the tokens that are computed.
        stop: One past the last query.
        keys: The keys [K] as indices of packed tokens, ascending; the last ones are the queries themselves.
        hidden: Which of the last keys each query does not see, [stop - start, at most K] bool; it sees all keys before
            these. None for queries without a branch among them, where a pair's distance decides.
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
    """n tiles as if each had Q queries and K keys: a tile that has fewer gets padding before them.

    Attributes:
        query_rows: Which rows of the queries [tokens * heads, D] are gathered, [n * heads * Q].
        key_rows: Which rows of the keys [all tokens * key heads, D] are gathered, [n * key heads * K].
        mask: What is added to the scores of the last keys, [n or 1, 1, Q, at most K] in float32.
        key_padding: What is added to the scores of the first keys, [n, 1, 1, at most K] in float32; None without
            padding.
        query_padding: Which of ``query_rows`` are padding; None without padding.
        shape: The numbers n, Q and K.
    """

    query_rows: Tensor
    key_rows: Tensor
    mask: Tensor
    key_padding: Tensor | None
    query_padding: Tensor | None
    shape: tuple[int, int, int]

    @property
    def matrices(self) -> int:
        """How many matrices are multiplied at a time: n * key heads."""
        return len(self.key_rows) // self.shape[2]


@dataclass(frozen=True)
class KeySum:
    """How to sum the gradients that some batches have made for the rows of keys that they gathered.

    Attributes:
        batches: The batches.
        places: Where each row of the keys stands among the batches' ``key_rows``, one row's places after another's.
        offsets: Where the places of each row begin, [all tokens * key heads].
    """

    batches: list[TileBatch]
    places: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Tiling:
    """All tiles of a packed batch.

    Attributes:
        sums: All batches of tiles, in groups whose gradients of keys are summed together.
        query_places: Where each row of the queries stands among all batches' ``query_rows``, [T * heads].
    """

    sums: list[KeySum]
    query_places: Tensor

    @property
    def batches(self) -> list[TileBatch]:
        return [batch for part in self.sums for batch in part.batches]


def make_tiling(trie: Trie, window: int | None, heads: int, key_heads: int, known: np.ndarray | None = None) -> Tiling:
    """The tiles of a packed batch for layers with so many heads.

    Args:
        trie: The packed tokens.
        window: How many positions back a token sees, itself included; None for all.
        heads: How many query heads a layer has.
        key_heads: How many key heads a layer has.
        known: The tokens that no tile computes, [tokens] bool; see :func:`vpd.packing.kernels.blocks.partition`.
    """
    blocks = partition(trie, window, known=known, costs=(KEY_COST, TILE_COST))
    return batch_tiles(cut_into_tiles(blocks, trie, window, heads), len(trie.tokens), window, heads, key_heads)


def cut_into_tiles(blocks: Sequence[Block], trie: Trie, window: int | None, heads: int) -> list[Tile]:
    """Cut the blocks' queries into tiles of similar size. A tile has at most ``TILE_SCORES`` scores, or one query.

    A tile's keys end at its last query, since no token sees a later one, so that more tiles make fewer scores.

    Args:
        blocks: The blocks in packed order; they cover every token that is computed.
        trie: The tokens that the blocks are cut from.
        window: How many positions back a token sees, itself included; None for all.
        heads: How many query heads a layer has; a tile holds the scores of all.
    """
    tiles, start = [], 0
    for block in blocks:
        keys = np.concatenate([np.arange(*key_range) for key_range in block.key_ranges])
        count, before = block.query_count, block.key_count - block.query_count
        # n tiles make about Q^2 / 2n pairs that no query may see, and gather about n (before + Q / 2) keys. This n
        # makes their total cost least.
        least = round(count / math.sqrt(2 * KEY_COST * (before + count / 2)))
        first = 0
        while first < count:
            # A head has queries * (the keys before them + queries) scores.
            seen = before + first
            most = int((math.sqrt(seen**2 + 4 * TILE_SCORES / heads) - seen) / 2)
            last = first + max(1, min(math.ceil((count - first) / max(1, least)), most))
            # In a chain, the windows of later queries begin later.
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
    """The mask [Q, K] bool without its first keys, which all queries see."""
    partly = np.flatnonzero(hidden.any(0))
    return hidden[:, partly[0] if len(partly) else hidden.shape[1] :]


def _hidden_in_chain(queries: int, keys: int, window: int | None) -> np.ndarray:
    """The same mask [queries, at most keys] for the last ``queries`` of a chain of so many keys."""
    width = queries if window is None or keys <= window else keys
    distance = np.arange(width - queries, width)[:, None] - np.arange(width)
    return (distance < 0) | (distance >= (width if window is None else window))


def batch_tiles(tiles: Sequence[Tile], token_count: int, window: int | None, heads: int, key_heads: int) -> Tiling:
    """Put tiles of similar size into batches, so that padding and calls cost least. A batch has at most
    ``BATCH_SCORES`` scores, or one tile.

    Args:
        tiles: The tiles; they cover every token that is computed.
        token_count: How many tokens there are, known ones included, whose keys the tiles gather.
        window: How many positions back a token sees, itself included; None for all.
        heads: How many query heads the layer has.
        key_heads: How many key heads the layer has.
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
    """The places of all rows but the padding (-1) in the chained ``rows``, ordered by row; and the ordered rows."""
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
    """The batch, and its rows of queries and of keys, -1 for padding; ``masks`` collects the chains' masks by shape."""
    n, queries, most_keys = len(tiles), max(tile.query_count for tile in tiles), max(len(tile.keys) for tile in tiles)
    keys = _rounded_up(most_keys)
    query_tokens, key_tokens = np.full((n, queries), -1), np.full((n, keys), -1)
    for i, tile in enumerate(tiles):
        query_tokens[i, queries - tile.query_count :] = np.arange(tile.start, tile.stop)
        key_tokens[i, keys - len(tile.keys) :] = tile.keys
    if all(tile.hidden is None for tile in tiles):
        # Tiles are aligned at their lower right, so that a chain's mask holds for shorter ones too.
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
        # In the place of padding any row will do.
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
    """Tokens [n, count], -1 for padding, as rows of [tokens * heads]: [n * heads * count]."""
    rows = tokens[:, None] * heads + np.arange(heads)[:, None]
    return np.where(tokens[:, None] < 0, -1, rows).ravel()


def _index(rows: np.ndarray) -> Tensor:
    """The rows as int32, which is wide enough for the rows of one batch."""
    return torch.from_numpy(rows.astype(np.int32, casting="same_kind"))


def _additive(hidden: np.ndarray) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), _HIDDEN)
