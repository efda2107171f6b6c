"""Log-probabilities of given tokens, differentiable, without a (tokens x vocabulary) tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vpd.device import is_cpu
from vpd.losses.head import (
    DEFAULT_CHUNK_SIZE,
    Head,
    HeadGradient,
    HeadProducts,
    check_hidden,
    check_settings,
    chunks,
    may_round_products,
    tiles,
)


def token_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, *, temperature: float = 1.0, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> Tensor:
    """log softmax(logits / temperature) of each token's target: log pi(y_t | x, y_<t), the summands of the E-step's
    log-ratio (VPD, arXiv 2605.15113).

    Each token may get a gradient of its own, which is not known in the forward pass. The backward pass therefore
    recomputes each chunk's logits by one more matmul, and they are not kept.

    Args:
        hidden: The hidden states [T, H] in any float dtype; position t predicts ``targets[t]`` (the caller shifts by
            one).
        head: The head that maps hidden states to logits.
        targets: The token ids [T] in int64, each in [0, V).
        temperature: The temperature that the logits are divided by.
        chunk_size: How many tokens' logits exist at a time.

    Returns:
        The log-probabilities [T] in nats, in fp32.

    Raises:
        ValueError: Shapes or dtypes do not fit, a setting is out of range, or a target is outside of the vocabulary.
            (The targets are checked on the CPU only, since on an accelerator the check would wait for the device.)
    """
    check_settings(temperature, chunk_size)
    check_hidden("hidden", hidden, head)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be [{hidden.shape[0]}] of int64, one token id for each hidden state, "
            f"got {tuple(targets.shape)} of {targets.dtype}."
        )
    if is_cpu(targets) and len(targets) > 0:
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= head.vocabulary_size:
            raise ValueError(
                f"targets must be token ids from 0 to {head.vocabulary_size - 1}, got values from {low} to {high}; "
                "leave out masked positions (such as -100) before the call."
            )
    return _TokenLogProbs.apply(hidden, head.weight, head.bias, targets, head, temperature, chunk_size)  # type: ignore[return-value]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        chunk_size: int,
    ) -> Tensor:
        ctx.head, ctx.temperature, ctx.chunk_size = head, temperature, chunk_size
        # The backward pass runs outside of the caller's autocast, and must compute the same logits.
        ctx.rounded = may_round_products(hidden.device)
        head = head.detached_float32()
        products = HeadProducts(head.weight, rounded=ctx.rounded)
        target_logits = torch.empty(hidden.shape[0], device=hidden.device)
        log_normaliser = torch.empty_like(target_logits)
        for rows in chunks(hidden.shape[0], chunk_size):
            logits = head.logits(hidden[rows], temperature, products=products)
            target_logits[rows] = logits.gather(1, targets[rows, None])[:, 0]
            for tile in tiles(logits):
                log_normaliser[rows][tile] = logits[tile].logsumexp(-1)
            # The next chunk's logits are made when these are gone.
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser)
        return target_logits - log_normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_normaliser = ctx.saved_tensors
        head = Head(weight, bias, ctx.head.scale, ctx.head.softcap).detached_float32()
        products = HeadProducts(head.weight, rounded=ctx.rounded)
        gradient = HeadGradient(head, products, hidden, ctx.needs_input_grad[:3], ctx.temperature)
        for rows in chunks(hidden.shape[0], ctx.chunk_size):
            hidden_chunk = hidden[rows].float()
            logits = head.logits(hidden_chunk, ctx.temperature, products=products)
            # The logits' memory is free for their gradient, unless a softcap's gradient will read them.
            grad_logits = logits if head.softcap is None else logits.clone()
            # softmax - one_hot is the negative of d log p(target) / d logits; the row weights carry the sign.
            for tile in tiles(logits):
                grad_logits[tile].sub_(log_normaliser[rows][tile, None]).exp_()
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[rows]] -= 1.0
            gradient.add_chunk(rows, hidden_chunk, logits, grad_logits, -grad_log_probs[rows])
            del logits, grad_logits
        dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        gradients = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((gradient.hidden, gradient.weight, gradient.bias), dtypes, strict=True)
        )
        return *gradients, None, None, None, None
