"""Attention of a packed batch's blocks by matrix products, for bfloat16 on a processor.

PyTorch's own kernel multiplies in float32 there, at a fraction of the rate of oneDNN's products. Here all products have
bfloat16 factors and float32 sums, as in kernels for GPUs. Scores and the gradient of the weights, of which the softmax
takes away what a row has in common, come out in float32, all others in bfloat16, at twice the rate. Scores exist a tile
at a time, in memory that all tiles of a batch share, and the backward pass makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpd.packing.blocks import Block
from vpd.processor import multiplies_bfloat16, rounding_factors

TILE_SCORES = 2**20
"""Scores of a tile, all heads together: 4 MB in float32. Smaller ones have slower products, larger ones leave the
cache that cores share."""

TILE_COST = 2**17
"""What a further tile costs, in scores of all heads together, forward and backward: measured on an EPYC."""


@dataclass(frozen=True)
class Tile:
    """Queries of a block, one token's after another's.

    Attributes:
        start, stop: their place among the tokens that are computed.
        key_count: how many of the block's keys they may see, from its first on.
        mask: [stop - start, the last so many of these keys], float32, added to the scores.
    """

    start: int
    stop: int
    key_count: int
    mask: Tensor


@dataclass(frozen=True)
class TiledBlock:
    """A block's keys as ranges of tokens, and its queries as tiles."""

    key_ranges: tuple[tuple[int, int], ...]
    tiles: list[Tile]


class Workspace:
    """Memory for one tile's scores, weights and gradients, given out again for the next tile."""

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


def cut_into_tiles(
    blocks: Sequence[Block], masks: Sequence[Tensor | None], heads: int, largest: int = TILE_SCORES
) -> list[TiledBlock]:
    """Cut the blocks' queries into tiles of like size, of at most ``largest`` scores, or those of one token's queries.

    A tile's keys end at its last query, whose token sees none behind itself, so that more tiles make fewer scores.

    Args:
        blocks: in packed order; they cover every token that is computed.
        masks: for each block [Q, K] float32, or None where it is causal.
        heads: query heads, whose scores a tile holds together.
        largest: see :data:`TILE_SCORES`.
    """
    tiled, start = [], 0
    for block, mask in zip(blocks, masks, strict=True):
        count, before = block.query_count, block.key_count - block.query_count
        # n tiles of Q queries make about Q^2 / 2n scores a head that no query may see. With this n their cost and that
        # of the tiles together are least.
        least = max(1, round(count / math.sqrt(2 * TILE_COST / heads)))
        tiles, first = [], 0
        while first < count:
            # Scores a head: tokens * (the keys before them + tokens).
            keys = before + first
            most = int((math.sqrt(keys**2 + 4 * largest / heads) - keys) / 2)
            last = first + max(1, min(math.ceil((count - first) / max(1, least - len(tiles))), most))
            if mask is None:
                seen = torch.full((last - first, last - first), float("-inf")).triu_(1)
            else:
                seen = mask[first:last, : before + last]
            tiles.append(Tile(start + first, start + last, before + last, seen))
            first = last
        tiled.append(TiledBlock(block.key_ranges, tiles))
        start += count
    return tiled


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[TiledBlock], scaling: float, workspace: Workspace
) -> Tensor:
    """Attention of all blocks; differentiable once.

    Args:
        query: [key heads, T * R, D] bfloat16, the R query heads of a key head as rows, one token's after another's.
        key: [key heads, tokens, D] bfloat16.
        value: [key heads, tokens, D of values] bfloat16.
        blocks: see :func:`cut_into_tiles`; together their tiles are the T tokens in order.
        scaling: factor on the scores.
        workspace: for the tiles of this call.

    Returns:
        [key heads, T * R, D of values] bfloat16.
    """
    return _Products.apply(query, key, value, blocks, scaling, workspace)  # pyright: ignore[reportReturnType]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[TiledBlock],
        scaling: float,
        workspace: Workspace,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scaling, ctx.workspace = blocks, scaling, workspace
        rows = query.shape[1] // _token_count(blocks)
        output = query.new_empty(*query.shape[:2], value.shape[2])
        for block in blocks:
            block_key, block_value = _gather(key, block).float(), _gather(value, block)
            for tile in block.tiles:
                place = slice(tile.start * rows, tile.stop * rows)
                weights = _weights(query[:, place], block_key, tile, scaling, workspace)
                rounded = workspace.take("products", weights.shape, key.dtype).copy_(weights)
                output[:, place] = torch.bmm(rounded, block_value[:, : tile.key_count])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        workspace: Workspace = ctx.workspace
        rows = query.shape[1] // _token_count(ctx.blocks)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for block in ctx.blocks:
            block_key, block_value = _gather(key, block), _gather(value, block).float()
            wide_key = block_key.float()
            for tile in block.tiles:
                place, seen = slice(tile.start * rows, tile.stop * rows), slice(tile.key_count)
                grad = grad_output[:, place]
                weights = _weights(query[:, place], wide_key, tile, ctx.scaling, workspace)
                products = workspace.take("products", weights.shape, key.dtype).copy_(weights)
                _add_to(grad_value, torch.bmm(products.transpose(1, 2), grad), block.key_ranges)
                grad_weights = workspace.take("gradient", weights.shape, torch.float32)
                _multiply(grad, block_value[:, seen], grad_weights)
                # Into its own input, as the softmax: both read a row whole before they write it, or number by number.
                torch.ops.aten._softmax_backward_data.out(
                    grad_weights, weights, -1, torch.float32, grad_input=grad_weights
                )
                products.copy_(grad_weights)
                grad_query[:, place] = torch.bmm(products, block_key[:, seen])
                _add_to(grad_key, torch.bmm(products.transpose(1, 2), query[:, place]), block.key_ranges)
        grad_query.mul_(ctx.scaling)
        grad_key.mul_(ctx.scaling)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _token_count(blocks: Sequence[TiledBlock]) -> int:
    return blocks[-1].tiles[-1].stop


def _gather(tensor: Tensor, block: TiledBlock) -> Tensor:
    pieces = [tensor[:, start:stop] for start, stop in block.key_ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _weights(query: Tensor, block_key: Tensor, tile: Tile, scaling: float, workspace: Workspace) -> Tensor:
    """[key heads, rows, keys] float32, in the workspace's "weights"; ``block_key`` is float32."""
    scores = workspace.take("weights", (*query.shape[:2], tile.key_count), torch.float32)
    _multiply(query, block_key[:, : tile.key_count], scores)
    # A mask's row stands for all rows of its token.
    by_token = scores.view(scores.shape[0], tile.stop - tile.start, -1, tile.key_count)
    unmasked = tile.key_count - tile.mask.shape[1]
    torch.add(tile.mask[:, None], by_token[..., unmasked:], alpha=scaling, out=by_token[..., unmasked:])
    if unmasked:
        by_token[..., :unmasked].mul_(scaling)
    return torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def _multiply(left: Tensor, right: Tensor, output: Tensor) -> None:
    """left right^T into ``output``, in float32; what is rounded of the factors, numbers of bfloat16, is nothing."""
    with rounding_factors(left.device):
        torch.bmm(left.float(), right.transpose(1, 2), out=output)


def _add_to(total: Tensor, part: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    """Add [heads, n, D] to the first n tokens of the ranges."""
    place = 0
    for start, stop in ranges:
        count = min(stop - start, part.shape[1] - place)
        total[:, start : start + count] += part[:, place : place + count]
        place += count
