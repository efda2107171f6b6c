"""Attention of a packed batch by matrix products, for bfloat16 on a CPU.

PyTorch's own kernel multiplies in float32 there, at a fraction of the rate of oneDNN's products. Here all products have
bfloat16 factors and float32 sums, as in kernels for GPUs. The scores and the gradient of the weights have float32
results, because the softmax subtracts what a row has in common; all other results are bfloat16, at twice the rate. The
scores of one batch of tiles (:mod:`vpd.packing.kernels.tiles`) exist at a time, in memory that all batches share, and
the backward pass recomputes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpd.device import is_cpu, multiplies_bfloat16, rounding_factors
from vpd.packing.kernels.tiles import KeySum, TileBatch, Tiling, make_tiling
from vpd.packing.layout import Segments


class Workspace:
    """Memory for the inputs and results of a batch of tiles, which the next batch uses again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the memory that was last taken under this name and dtype."""
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(*shape)


class Prepared:
    """The tilings of one packed batch, made at first use, and the memory in which they are computed.

    Args:
        segments: The segments of the batch.

    Attributes:
        workspace: The memory that all layers and passes share.
    """

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self._tilings: dict[tuple[int | None, int, int], Tiling] = {}
        self.workspace = Workspace()

    def tiling(self, window: int | None, heads: int, key_heads: int) -> Tiling:
        """The tiles for layers that see ``window`` positions back and have so many heads."""
        key = (self._segments.effective(window), heads, key_heads)
        if key not in self._tilings:
            self._tilings[key] = make_tiling(self._segments.trie, *key, self._segments.known)
        return self._tilings[key]


def can_multiply(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether :func:`attend` can compute it: bfloat16 on a CPU with native products of that dtype, no dropout."""
    is_bfloat16 = all(tensor.dtype == torch.bfloat16 for tensor in (query, key, value))
    return is_bfloat16 and is_cpu(query) and not dropout and multiplies_bfloat16()


def attend(query: Tensor, key: Tensor, value: Tensor, tiling: Tiling, scaling: float, workspace: Workspace) -> Tensor:
    """Attention of all tiles; differentiable once.

    Args:
        query: The queries [T, heads, D] in bfloat16.
        key: The keys [tokens, key heads, D] in bfloat16.
        value: The values [tokens, key heads, D of values] in bfloat16.
        tiling: The tiles of the T tokens; see :func:`vpd.packing.kernels.tiles.make_tiling`.
        scaling: The factor on the scores.
        workspace: The memory for the tiles.

    Returns:
        The outputs [T, heads, D of values] in bfloat16.
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
                # The result replaces its input, as the softmax's does: both read a row before they write it.
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
    """For each row of the keys, the sum over all places where it was gathered, [tokens * key heads, width]. It is
    summed in float32 and rounded."""
    return F.embedding_bag(part.places, rows, part.offsets, mode="sum")


def _total(sums: list[Tensor]) -> Tensor:
    if len(sums) == 1:
        return sums[0]
    total = sums[0].float()
    for further in sums[1:]:
        total += further
    return total.to(sums[0].dtype)


class _Gatherer:
    """Gathers a batch's rows in the workspace, as the matrices of its tiles and key heads."""

    def __init__(self, batch: TileBatch, workspace: Workspace) -> None:
        self._batch, self._workspace = batch, workspace

    def queries(self, tensor: Tensor, name: str = "queries") -> Tensor:
        """From [T, heads, width] to [n * key heads, query heads of a key head * Q, width]."""
        return self._take(tensor, self._batch.query_rows, name)

    def keys(self, tensor: Tensor) -> Tensor:
        """From [tokens, key heads, width] to [n * key heads, K, width], in the place of the keys last gathered in this
        dtype."""
        return self._take(tensor, self._batch.key_rows, "keys")

    def _take(self, tensor: Tensor, rows: Tensor, name: str) -> Tensor:
        width = tensor.shape[-1]
        gathered = self._workspace.take(name, (len(rows), width), tensor.dtype)
        torch.index_select(tensor.view(-1, width), 0, rows, out=gathered)
        return gathered.view(self._batch.matrices, -1, width)


class _Results:
    """The results of all batches, one batch after another.

    Attributes:
        rows: The results, row by row, [all rows, width].
    """

    def __init__(self, name: str, sizes: Sequence[int], like: Tensor, workspace: Workspace) -> None:
        self.rows = workspace.take(f"results of {name}", (sum(sizes), like.shape[-1]), like.dtype)
        self._parts = iter(self.rows.split(list(sizes)))

    def next(self, batch: TileBatch) -> Tensor:
        """The uninitialised memory [n * key heads, rows, width] for the next batch's result."""
        return next(self._parts).view(batch.matrices, -1, self.rows.shape[1])


def _weights(query: Tensor, wide_key: Tensor, batch: TileBatch, scaling: float, workspace: Workspace) -> Tensor:
    """The attention weights [n * key heads, query heads of a key head * Q, K] in float32, in the workspace;
    ``wide_key`` is float32."""
    count, queries, keys = batch.shape
    scores = workspace.take("weights", (*query.shape[:2], keys), torch.float32)
    _multiply(query, wide_key, scores, workspace, scaling)
    by_head = scores.view(count, -1, queries, keys)
    by_head[..., keys - batch.mask.shape[-1] :].add_(batch.mask)
    if batch.key_padding is not None:
        by_head[..., : batch.key_padding.shape[-1]].add_(batch.key_padding)
    return torch.ops.aten._softmax.out(scores, -1, False, out=scores)


def _multiply(left: Tensor, right: Tensor, output: Tensor, workspace: Workspace, factor: float = 1.0) -> None:
    """Write ``factor`` left right^T to ``output`` in float32. The factors hold bfloat16 numbers, so that rounding them
    changes nothing."""
    wide = workspace.take("factor", left.shape, torch.float32).copy_(left)
    with rounding_factors(left.device):
        torch.baddbmm(output, wide, right.transpose(1, 2), beta=0, alpha=factor, out=output)
