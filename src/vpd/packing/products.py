"""Attention of a packed batch by matrix products, for bfloat16 on a processor.

PyTorch's own kernel multiplies in float32 there, at a fraction of the rate of oneDNN's products. Here all products have
bfloat16 factors and float32 sums, as in kernels for GPUs. Scores and the gradient of the weights, of which the softmax
takes away what a row has in common, come out in float32, all others in bfloat16, at twice the rate.

Queries are cut into tiles, whose keys end at the last one of them, and tiles of like size are multiplied together,
their queries, keys and values gathered row by row. So a branch asks for its own ancestors alone, and what a
call costs is shared by many. Scores exist a batch of tiles at a time, in memory that all batches share, and the
backward pass makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpd.packing.blocks import Block, allowed_pairs, partition
from vpd.packing.trie import Trie
from vpd.processor import multiplies_bfloat16, rounding_factors

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
# and what a branch's being a block of its own costs in padding. Measured on an EPYC, forward and backward; from half of
# these to twice as much makes no difference beyond noise.
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


class Workspace:
    """Memory for what batches of tiles read and make, given out again for the next ones."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised; what was taken before under this name and dtype is overwritten."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(*shape)


def can_multiply(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether :func:`attend` computes this: in bfloat16, on a processor that has such products, without dropout."""
    is_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in (query, key, value))
    return is_bfloat16 and query.device.type == "cpu" and not dropout and multiplies_bfloat16()


def make_tiling(trie: Trie, window: int | None, heads: int, key_heads: int, known: np.ndarray | None = None) -> Tiling:
    """The tiles of a packed batch for layers with so many heads.

    Args:
        trie: the packed tokens.
        window: how many positions back a token sees, itself included; None for all.
        heads, key_heads: of a layer.
        known: [tokens] bool, which no tile asks for; see :func:`vpd.packing.blocks.partition`.
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
        places, offsets = _places([key_rows for _, _, key_rows in made[first:last]], key_heads * token_count)
        sums.append(KeySum([batch for batch, _, _ in made[first:last]], places, offsets))
        first = last
    query_places, _ = _places([query_rows for _, query_rows, _ in made], heads * token_count)
    return Tiling(sums, query_places)


def _places(rows: Sequence[np.ndarray], count: int) -> tuple[Tensor, Tensor]:
    """Where each of ``count`` rows stands in ``rows``, padding of which is -1, and where each row's places begin."""
    chained = np.concatenate([part.ravel() for part in rows])
    places = np.argsort(chained, kind="stable")
    ordered = chained[places]
    first = int(np.searchsorted(ordered, 0))
    assert len(chained) < 2**31
    offsets = np.searchsorted(ordered[first:], np.arange(count))
    return torch.from_numpy(places[first:].astype(np.int32)), torch.from_numpy(offsets.astype(np.int32))


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
    # Aligned at its lower right, as tiles stand here, a chain's mask holds for shorter ones too.
    hidden = _hidden_in_chain(queries, most_keys, window)
    if all(tile.hidden is None for tile in tiles):
        mask = masks.setdefault(hidden.shape, _additive(hidden)[None, None])
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
        query_rows=_index(query_rows),
        key_rows=_index(key_rows),
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
    """Any row in the place of padding."""
    return torch.from_numpy(rows.clip(min=0).astype(np.int32))


def _additive(hidden: np.ndarray) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), _HIDDEN)


def attend(query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, scaling: float, workspace: Workspace) -> Tensor:
    """Attention of all tiles; differentiable once.

    Args:
        query: [T, heads, D] bfloat16.
        key: [tokens, key heads, D] bfloat16.
        value: [tokens, key heads, D of values] bfloat16.
        tiling: see :func:`make_tiling`; its tiles are the T tokens.
        scaling: factor on the scores.
        workspace: for the tiles of this call.

    Returns:
        [T, heads, D of values] bfloat16.
    """
    rows = (tensor.contiguous() for tensor in (query, key, value))
    return _Products.apply(*rows, tiling, scaling, workspace)  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, scaling: float, workspace: Workspace
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.tiling, ctx.scaling, ctx.workspace = tiling, scaling, workspace
        wide_key = key.float()
        outputs = _Results("query", [len(batch.query_rows) for batch in tiling.batches], value, workspace)
        for batch in tiling.batches:
            gather = _Gatherer(batch, workspace)
            weights = _weights(gather.queries(query), gather.keys(wide_key), batch, scaling, workspace)
            rounded = workspace.take("products", weights.shape, value.dtype).copy_(weights)
            torch.bmm(rounded, gather.keys(value), out=outputs.next(batch))
        return outputs.rows.index_select(0, tiling.query_places).view(*query.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        tiling, workspace = ctx.tiling, ctx.workspace
        grad_output = grad_output.contiguous()
        wide_key, wide_value = key.float(), value.float()
        grad_query = _Results("query", [len(batch.query_rows) for batch in tiling.batches], query, workspace)
        key_sums, value_sums = [], []
        for part in tiling.sums:
            sizes = [len(batch.key_rows) for batch in part.batches]
            grad_key, grad_value = _Results("key", sizes, key, workspace), _Results("value", sizes, value, workspace)
            for batch in part.batches:
                gather = _Gatherer(batch, workspace)
                queries, grad = gather.queries(query), gather.queries(grad_output, "output's gradient")
                if batch.query_padding is not None:
                    grad.view(-1, grad.shape[-1]).index_fill_(0, batch.query_padding, 0.0)
                weights = _weights(queries, gather.keys(wide_key), batch, ctx.scaling, workspace)
                products = workspace.take("products", weights.shape, key.dtype).copy_(weights)
                torch.bmm(products.transpose(1, 2), grad, out=grad_value.next(batch))
                grad_weights = workspace.take("weights' gradient", weights.shape, torch.float32)
                _multiply(grad, gather.keys(wide_value), grad_weights, workspace)
                # Into its own input, as the softmax: both read a row whole before they write it, or number by number.
                torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, torch.float32, grad_input=grad_weights
                )
                products.copy_(grad_weights)
                torch.bmm(products, gather.keys(key), out=grad_query.next(batch))
                torch.bmm(products.transpose(1, 2), queries, out=grad_key.next(batch))
            key_sums.append(_sum(grad_key.rows, part))
            value_sums.append(_sum(grad_value.rows, part))
        return (
            grad_query.rows.index_select(0, tiling.query_places).mul_(ctx.scaling).view_as(query),
            _total(key_sums).mul_(ctx.scaling).view_as(key),
            _total(value_sums).view_as(value),
            None,
            None,
            None,
        )


def _sum(rows: Tensor, part: KeySum) -> Tensor:
    """[tokens * key heads, width]: of each row of the keys the sum over all places where it was gathered, made in
    float32 and rounded."""
    return F.embedding_bag(part.places, rows, part.offsets, mode="sum")


def _total(sums: list[Tensor]) -> Tensor:
    if len(sums) == 1:
        return sums[0]
    total = sums[0].float()
    for further in sums[1:]:
        total += further
    return total.to(sums[0].dtype)


class _Gatherer:
    """Gathers a batch's rows, for the matrices of its tiles and key heads, in the workspace."""

    def __init__(self, batch: TileBatch, workspace: Workspace) -> None:
        self._batch, self._workspace = batch, workspace

    def queries(self, tensor: Tensor, name: str = "queries") -> Tensor:
        """[n * key heads, query heads of one * Q, width] of [T, heads, width]."""
        return self._take(tensor, self._batch.query_rows, name)

    def keys(self, tensor: Tensor) -> Tensor:
        """[n * key heads, K, width] of [tokens, key heads, width]; overwrites what was gathered in this dtype."""
        return self._take(tensor, self._batch.key_rows, "keys")

    def _take(self, tensor: Tensor, rows: Tensor, name: str) -> Tensor:
        width = tensor.shape[-1]
        gathered = self._workspace.take(name, (len(rows), width), tensor.dtype)
        torch.index_select(tensor.view(-1, width), 0, rows, out=gathered)
        return gathered.view(self._batch.matrices, -1, width)


class _Results:
    """What batches make, row by row, one batch behind another, in ``rows``."""

    def __init__(self, name: str, sizes: Sequence[int], like: Tensor, workspace: Workspace) -> None:
        self.rows = workspace.take(f"results of {name}", (sum(sizes), like.shape[-1]), like.dtype)
        self._parts = iter(self.rows.split(list(sizes)))

    def next(self, batch: TileBatch) -> Tensor:
        """Uninitialised [n * key heads, rows, width], for the next batch's result."""
        return next(self._parts).view(batch.matrices, -1, self.rows.shape[1])


def _weights(query: Tensor, wide_key: Tensor, batch: TileBatch, scaling: float, workspace: Workspace) -> Tensor:
    """[n * key heads, query heads of one * Q, K] float32, in the workspace's "weights"; ``wide_key`` is float32."""
    count, queries, keys = batch.shape
    scores = workspace.take("weights", (*query.shape[:2], keys), torch.float32)
    _multiply(query, wide_key, scores, workspace, scaling)
    by_head = scores.view(count, -1, queries, keys)
    by_head[..., keys - batch.mask.shape[-1] :].add_(batch.mask)
    if batch.key_padding is not None:
        by_head[..., : batch.key_padding.shape[-1]].add_(batch.key_padding)
    return torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def _multiply(left: Tensor, right: Tensor, output: Tensor, workspace: Workspace, factor: float = 1.0) -> None:
    """``factor`` left right^T into ``output``, in float32; what is rounded of the factors, numbers of bfloat16, is
    nothing."""
    wide = workspace.take("factor", left.shape, torch.float32).copy_(left)
    with rounding_factors(left.device):
        torch.baddbmm(output, wide, right.transpose(1, 2), beta=0, alpha=factor, out=output)
