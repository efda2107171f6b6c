"""Tied embeddings whose gradient is added to that of the output head, in place of a second matrix as large.

Where a model embeds tokens by its head's weight, that weight's gradient comes from two places. The head's part is there
when the backward pass begins. At its end autograd makes the embedding's part as a whole matrix, which is zero but for
the rows of the batch's tokens, and adds it. Here autograd gets a zero without memory, and a hook adds these rows to the
head's part right before the weight receives it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpd.policy.architecture import causal_lm_of
from vpd.policy.cpu.replacing import is_untouched


class TiedRows:
    """The embedding's part of a weight's gradient, from the embedding's backward pass until the weight receives it.

    Args:
        weight: The weight [V, H]; a hook on it adds the rows, unless it is frozen.

    Attributes:
        are_added: Whether there is that hook.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.are_added = weight.requires_grad
        if self.are_added:
            weight.register_hook(self._add_to)

    def __reduce__(self) -> tuple[type[TiedRows], tuple[Tensor]]:
        """A copy, deep or pickled, registers a hook on its own weight: hooks of tensors are not copied."""
        return TiedRows, (self.weight,)

    def put(self, tokens: Tensor, grad: Tensor) -> None:
        """Keep the gradient [T, H] of the rows ``tokens`` [T]."""
        self._parts.append((tokens, grad))

    def clear(self) -> None:
        """Drop what a failed backward pass has left behind."""
        self._parts.clear()

    def _add_to(self, grad: Tensor) -> Tensor:
        parts, self._parts = self._parts, []
        if parts:
            # Where the head has no gradient, or one number for all entries, the entries have no memory of their own.
            grad = grad.contiguous()
        for tokens, rows in parts:
            grad.index_add_(0, tokens, rows)
        return grad


class TiedEmbedding(nn.Embedding):
    """An embedding whose backward pass adds to the gradient of the head that it is tied to.

    Should its weight be replaced by another later on, as where weights are sharded, autograd's own way is taken again.

    Args:
        embedding: The module whose place it takes and whose weight it shares.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        weight = embedding.weight
        super().__init__(*weight.shape, padding_idx=embedding.padding_idx, _weight=weight.detach())
        self.weight = weight
        self.rows = TiedRows(weight)
        self.training = embedding.training

    def forward(self, input: Tensor) -> Tensor:
        """[...] token ids to [..., H]."""
        if self.rows.are_added and self.weight is self.rows.weight:
            return _Embedded.apply(input, self.weight, self.padding_idx, self.rows)  # pyright: ignore[reportReturnType]
        return super().forward(input)


def fuse_embedding(model: nn.Module) -> int:
    """Replace a tied embedding by :class:`TiedEmbedding`; return how many were replaced, 1 or 0.

    An embedding stays as it is where it computes something else (a scaled one, or one with a largest norm), where its
    sums would be rounded row by row (in other dtypes than float32), or where its weight has hooks, which want to see
    all of the gradient.

    Args:
        model: A language model on the CPU.
    """
    causal_lm = causal_lm_of(model)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if type(embedding) is not nn.Embedding or not is_untouched(embedding):
        return 0
    weight = embedding.weight
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    is_tied = weight is getattr(head, "weight", None) and weight.requires_grad and weight.dtype == torch.float32
    if not (is_plain and is_tied) or weight._backward_hooks:
        return 0
    causal_lm.set_input_embeddings(TiedEmbedding(embedding))
    return 1


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding_idx: int | None, rows: TiedRows) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.padding_idx, ctx.rows = padding_idx, rows
        rows.clear()
        return F.embedding(tokens, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor, None, None]:
        tokens = ctx.saved_tensors[0].reshape(-1)
        grad = grad_output.reshape(len(tokens), -1)
        if ctx.padding_idx is not None:
            is_token = tokens != ctx.padding_idx
            tokens, grad = tokens[is_token], grad[is_token]
        ctx.rows.put(tokens, grad)
        weight = ctx.rows.weight
        # This zero without memory gives the hook a gradient to add to where the head has none.
        return None, weight.new_zeros(()).expand_as(weight), None, None
