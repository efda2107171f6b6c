"""Tied embeddings whose gradient is added to that of the output head, in place of a second matrix as large.

Where a model embeds tokens by its head's weight, that weight's gradient comes from two places. The head's part is there
when the backward pass begins; the embedding's, which is zero but for the rows of a batch's tokens, autograd makes as a
whole matrix at its end, and adds. Here it gives a zero without memory, and a hook adds these rows to the head's part,
right before the weight gets it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpd.policy.architecture import causal_lm_of


class TiedRows:
    """The embedding's part of a weight's gradient, from the embedding's backward pass until the weight's turn.

    Args:
        weight: [V, H]; a hook on it adds the rows, unless it is frozen.

    Attributes:
        are_added: whether there is that hook.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._parts: list[tuple[Tensor, Tensor]] = []
        self.are_added = weight.requires_grad
        if self.are_added:
            weight.register_hook(self._add_to)

    def __reduce__(self) -> tuple[type[TiedRows], tuple[Tensor]]:
        """A copy, deep or pickled, has a hook on its own weight: those of tensors are not copied."""
        return TiedRows, (self.weight,)

    def put(self, tokens: Tensor, grad: Tensor) -> None:
        """Keep the gradient [T, H] of the rows ``tokens`` [T]."""
        self._parts.append((tokens, grad))

    def clear(self) -> None:
        """Drop what a backward pass that has failed left behind."""
        self._parts.clear()

    def _add_to(self, grad: Tensor) -> Tensor:
        parts, self._parts = self._parts, []
        if parts:
            # Where the head has none, or one number for all of them, entries have no memory of their own.
            grad = grad.contiguous()
        for tokens, rows in parts:
            grad.index_add_(0, tokens, rows)
        return grad


def fuse_embedding(model: nn.Module) -> bool:
    """Let a tied embedding compute as this module describes, for good; return whether it does.

    Where there is a GPU, none does; nor one that computes something else (a scaled one, or with a largest norm), one
    whose sums would be rounded row by row (in other dtypes than float32), or one whose weight has hooks, which want to
    see all of the gradient. Should the weight be replaced by another later on, as where weights are sharded, autograd's
    own way is taken again.

    Args:
        model: a language model on the CPU.
    """
    causal_lm = causal_lm_of(model)
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    if torch.accelerator.is_available() or type(embedding) is not nn.Embedding or "forward" in vars(embedding):
        return False
    weight = embedding.weight
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    is_tied = weight is getattr(head, "weight", None) and weight.requires_grad and weight.dtype == torch.float32
    if not (is_plain and is_tied) or weight._backward_hooks:
        return False
    vars(embedding)["rows"] = TiedRows(weight)
    # On the instance, and under this name, as norms.py has it.
    embedding.forward = MethodType(forward, embedding)
    return True


def forward(embedding: nn.Embedding, input: Tensor) -> Tensor:
    """The ``forward`` of a fused embedding: [...] token ids to [..., H]."""
    rows = cast(TiedRows, embedding.rows)
    if rows.are_added and embedding.weight is rows.weight:
        return _Embedded.apply(input, embedding.weight, embedding.padding_idx, rows)  # pyright: ignore[reportReturnType]
    return type(embedding).forward(embedding, input)


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
        # Without memory, so that there is a gradient to add to where the head has none.
        return None, weight.new_zeros(()).expand_as(weight), None, None
