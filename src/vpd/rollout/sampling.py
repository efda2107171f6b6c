"""Draws the next token: temperature, cuts, and an inverse-CDF draw from one uniform number per sequence and step."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

BLOCK = 256
"""How many tokens are summed together before the draw searches among them: a running sum over a whole vocabulary and a
search in it are slow, while sums of blocks are fast."""


class TokenSampler:
    """Draws a token for each row of logits.

    Args:
        temperature: The number that logits are divided by; 0 takes the most likely token.
        top_p, top_k, min_p: The cuts of transformers' warpers of these names, in the order in which its ``generate``
            applies them (top-k, top-p, min-p); 1, 0 and 0 turn them off.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0):
        self.temperature = temperature
        self.warpers: list[LogitsProcessor] = []
        if top_k > 0:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        if min_p > 0:
            self.warpers.append(MinPLogitsWarper(min_p))

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token per row.

        Args:
            logits: The logits of the next token, [B, V], in any float dtype.
            uniforms: A number in [0, 1) for each row, [B] float64; the same number and the same logits give the same
                token. A greedy sampler does not read them.

        Returns:
            The token ids [B] and their log-probabilities [B] (float32) at the temperature, before any cut; at
            temperature 1 when greedy.

        Raises:
            FloatingPointError: The logits hold NaN or infinity where a probability is needed.
        """
        scores = logits.float()
        if self.temperature not in (0.0, 1.0):
            scores = scores / self.temperature
        maximum = scores.amax(dim=-1, keepdim=True)
        weights = (scores - maximum).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if not total.isfinite().all():
            raise FloatingPointError("The model's logits are not finite: its weights have diverged or are damaged.")
        if self.temperature == 0:
            tokens = scores.argmax(dim=-1)
        else:
            if self.warpers:
                weights = (self._cut(scores) - maximum).exp_()
            tokens = inverse_cdf(weights, uniforms)
        chosen = scores.gather(1, tokens[:, None])
        return tokens, (chosen - maximum - total.log())[:, 0]

    def _cut(self, scores: torch.Tensor) -> torch.Tensor:
        unused = torch.empty(0, dtype=torch.long)
        for warper in self.warpers:
            scores = warper(unused, scores)  # pyright: ignore[reportArgumentType]
        return scores


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Find the index at which the running sum of each row's weights passes ``uniform * total``.

    Args:
        weights: The unnormalised probabilities, [B, V] float32; none is negative, and each row has a positive sum.
        uniforms: A number in [0, 1) for each row, [B] float64.

    Returns:
        The indices, [B]; an index of weight 0 is never drawn.
    """
    size = weights.shape[1]
    whole = size - size % BLOCK
    sums = weights[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(dim=-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    sums = sums.double()
    block, rest = _search(sums, uniforms * sums.sum(dim=-1))
    inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=weights.device)
    candidates = weights.gather(1, inside.clamp(max=size - 1)).double().masked_fill_(inside >= size, 0)
    return block * BLOCK + _search(candidates, rest)[0]


def _search(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the first index whose running sum exceeds the target, and how much of the target is left at that index."""
    running = weights.cumsum(dim=-1)
    # Rounding can put the target at or above the last sum, where nothing exceeds it.
    target = torch.minimum(target, running[:, -1].nextafter(running.new_zeros(()))).clamp(min=0)
    index = torch.searchsorted(running, target[:, None], right=True)
    before = running.gather(1, index) - weights.gather(1, index)
    return index[:, 0], target - before[:, 0]


def sequence_uniforms(seed: int, prompt: int, generation: int, count: int) -> torch.Tensor:
    """The uniform numbers [count] (float64) of one sequence, which depend on the arguments alone.

    ``numpy``'s seed sequence mixes the three integers, so that neighbouring sequences and seeds are independent.

    Args:
        seed: The seed of the whole call.
        prompt: The place of the sequence's prompt among all prompts.
        generation: The number of the sequence among the completions of its prompt.
        count: How many numbers are drawn.
    """
    return torch.from_numpy(np.random.default_rng([seed, prompt, generation]).random(count))
