"""The decode loop: one batch of prompts to their completions, token by token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vpd.rollout.engine import Sample
from vpd.rollout.kv_cache import PreallocatedCache, StatefulCache, make_cache
from vpd.rollout.prefill import Prefill, last_token, padding_mask
from vpd.rollout.sampling import TokenSampler
from vpd.rollout.stopping import StopCondition


class Decoder:
    """Decodes batches of sequences with a network.

    Each distinct prompt is computed once. Its keys and values are copied for each of its completions, or shared by
    them where the network allows this and it saves enough. Sequences that end leave the batch at once.

    Args:
        network: A causal language model with :mod:`vpd.rollout.decode_attention`, in evaluation mode.

    Attributes:
        prefill: Computes the prompts.
        pads: Whether rows may be padded; a layer that carries a state from token to token would take the padding in.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._device = next(network.parameters()).device
        self._last_token = last_token(self._device)
        self.prefill = Prefill(network)
        self.pads = not isinstance(self._make_cache(max_length=1), StatefulCache)

    @torch.no_grad()
    def decode(
        self, prompts: list[tuple[int, ...]], uniforms: Tensor, sampler: TokenSampler, stop: StopCondition
    ) -> list[Sample]:
        """Decode one batch of sequences to their ends.

        Args:
            prompts: The prompt of each of the B sequences, equal ones included.
            uniforms: The random numbers that each step draws with, [steps, B]; there are as many steps as a completion
                may have tokens.
            sampler: Draws the tokens.
            stop: Tells where a completion ends.

        Returns:
            The B completions.
        """
        samples = [Sample() for _ in prompts]
        steps = len(uniforms)
        longest = max(map(len, prompts))
        cache, logits, mask = self._start(prompts, steps)
        position_ids = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=self._device)
        # Entry i is the number of the sequence that row i of the batch decodes.
        active = list(range(len(prompts)))
        for step in range(steps):
            tokens, log_probs = sampler(logits, uniforms[step, active])
            kept = _append([samples[sequence] for sequence in active], tokens, log_probs, stop)
            if not kept or step == steps - 1:
                break
            if len(kept) < len(active):
                order = cache.keep_rows(kept, self._device)
                active = [active[row] for row in order]
                tokens, position_ids = tokens[order], position_ids[order]
                mask = mask if mask is None else mask[order]
            position_ids = position_ids + 1
            seen = None if mask is None or cache.shares_prompts else mask[:, : longest + step + 1]
            logits = self._forward(tokens[:, None], seen, position_ids, cache)
        return samples

    def _start(
        self, prompts: list[tuple[int, ...]], steps: int
    ) -> tuple[PreallocatedCache | StatefulCache, Tensor, Tensor | None]:
        """Compute the prompts: a cache with a row for each sequence, the first logits [B, V], and the mask of all."""
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        cache = self._make_cache(max_length=max(map(len, distinct)) + steps)
        logits = self.prefill(list(distinct), cache)
        mask = padding_mask(list(distinct), self._device)
        prompt_of_row = [distinct[prompt] for prompt in prompts]
        sources = torch.tensor(prompt_of_row, device=self._device)
        shares = (
            self.prefill.shares and isinstance(cache, PreallocatedCache) and cache.share_prompts(prompt_of_row, mask)
        )
        if not shares:
            cache.expand(sources)
        if mask is not None:
            mask = nn.functional.pad(mask[sources], (0, steps), value=1)
        return cache, logits[sources], mask

    def _forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        cache: PreallocatedCache | StatefulCache,
    ) -> Tensor:
        """The logits of the next token, [rows, V]."""
        output = self._network(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._last_token,
        )
        return output.logits[:, -1]

    def _make_cache(self, max_length: int) -> PreallocatedCache | StatefulCache:
        return make_cache(cast(PreTrainedModel, self._network).config, max_length)


def _append(samples: list[Sample], tokens: Tensor, log_probs: Tensor, stop: StopCondition) -> list[int]:
    """Append a token to each sample; returns the rows of those that go on."""
    kept = []
    rows = zip(samples, tokens.tolist(), log_probs.tolist(), strict=True)
    for row, (sample, token, log_prob) in enumerate(rows):
        sample.token_ids.append(token)
        sample.log_probs.append(log_prob)
        if stop(sample.token_ids):
            sample.truncated = False
        else:
            kept.append(row)
    return kept
