"""Computes the prompts before decoding begins.

Prompts are packed, so that a beginning that several of them share is computed once and nothing is padded. Networks that
cannot be packed, and devices other than the CPU, get them padded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vpd.device import is_cpu
from vpd.packing import pack, packable
from vpd.rollout.kv_cache import PreallocatedCache, PreallocatedLayer, StatefulCache, make_cache

logger = logging.getLogger(__name__)

_LONGEST_WINDOW = 1024
"""The longest sliding window, in tokens, that the trial of packing goes beyond."""

_STATES_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02}
_LOGITS_TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.05}
_TOLERANCE = 0.01
"""How far keys and values, or logits, may be from the expected ones, as a share of their norm; the last number holds
for all other dtypes. Rounding to bfloat16 moves SmolLM2-135M's by 0.015 and 0.06; tokens that see what they must not
move them by 0.2 to 0.5 and 0.9 (both measured by hand)."""


class Prefill:
    """Computes prompts and fills a cache with them, in the way that a network was found to allow.

    Architectures hide state in places that no configuration names, and change keys on their way from the cache to
    attention. Therefore a few tokens are first computed in both ways. A trial that fails only costs speed, and the log
    says why it failed.

    Args:
        network: A causal language model with :mod:`vpd.rollout.decode_attention`, in evaluation mode.

    Attributes:
        packs: Whether prompts are packed.
        shares: Whether the completions of a prompt may share its keys and values
            (:meth:`PreallocatedCache.share_prompts`).
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._config = cast(PreTrainedModel, network).config
        self.packs = self.shares = False
        device = next(network.parameters()).device
        if not is_cpu(device) or isinstance(make_cache(self._config, max_length=1), StatefulCache):
            return
        with torch.no_grad():
            self.packs = self._succeeds(self._try_packing, "Prompts are padded, not packed")
            self.shares = self._succeeds(self._try_sharing, "Generations of a prompt do not share its cache")

    def __call__(self, prompts: Sequence[Sequence[int]], cache: PreallocatedCache | StatefulCache) -> Tensor:
        """Compute the prompts, which gives the empty cache a row for each of them.

        Returns:
            The logits of the token that follows each prompt, [prompts, V].
        """
        if self.packs and isinstance(cache, PreallocatedCache):
            return prefill_packed(self._network, prompts, cache)
        return prefill_padded(self._network, prompts, cache)

    def _succeeds(self, trial: Callable[[], None], consequence: str) -> bool:
        try:
            trial()
        except Exception as error:
            # An architecture may fail in any way, and a trial that serves speed alone must not stop a run.
            logger.info("%s: %s", consequence, error)
            return False
        return True

    def _try_packing(self) -> None:
        """Compute a few prompts packed and padded, and compare the logits and the caches."""
        possible, reason = packable(self._network)
        if not possible:
            raise ValueError(reason)
        window = getattr(self._config.get_text_config(), "sliding_window", None) or 0
        prompts = self._prompts(5 + (window if window <= _LONGEST_WINDOW else 0))
        packed, padded = self._cache(prompts), self._cache(prompts)
        found = prefill_packed(self._network, prompts, packed)
        expected = prefill_padded(self._network, prompts, padded)
        self._check(found, expected, _LOGITS_TOLERANCE)
        for layers in zip(packed.attention_layers, padded.attention_layers, strict=True):
            for states, others in zip(*((layer.keys, layer.values) for layer in layers), strict=True):
                assert states is not None
                assert others is not None
                for row, other, prompt in zip(states, others, prompts, strict=True):
                    # The padding before a prompt holds other numbers.
                    self._check(row[:, -len(prompt) :], other[:, -len(prompt) :], _STATES_TOLERANCE)

    def _try_sharing(self) -> None:
        """Decode one step with shared prompts and one with a copy for each row, and compare the logits."""
        prompts, prompt_of_row = self._prompts(5), [0, 1, 1, 2]
        shared, copied = self._cache(prompts), self._cache(prompts)
        if shared.depends_on_index:
            raise ValueError("attention depends on where keys stand in the cache.")
        for cache in (shared, copied):
            prefill_padded(self._network, prompts, cache)
        mask = padding_mask(prompts, torch.device("cpu"))
        assert mask is not None
        shared.share_prompts(prompt_of_row, mask, minimum_saving=0)
        copied.expand(torch.tensor(prompt_of_row))
        seen = nn.functional.pad(mask[prompt_of_row], (0, 1), value=1)
        found, expected = (
            self._network(
                input_ids=torch.tensor([prompts[prompt][:1] for prompt in prompt_of_row]),
                attention_mask=seen if cache is copied else None,
                position_ids=torch.tensor([[len(prompts[prompt])] for prompt in prompt_of_row]),
                past_key_values=cache,
                use_cache=True,
            ).logits
            for cache in (shared, copied)
        )
        self._check(found, expected, _LOGITS_TOLERANCE)

    def _prompts(self, longest: int) -> list[list[int]]:
        """Three prompts of different lengths, two of which begin alike."""
        words = self._config.get_text_config().vocab_size
        return [[token % words for token in prompt] for prompt in (range(longest), (0, 1, 2, 4), (3, 1))]

    def _cache(self, prompts: Sequence[Sequence[int]]) -> PreallocatedCache:
        cache = make_cache(self._config, max_length=max(map(len, prompts)) + 1)
        assert isinstance(cache, PreallocatedCache)
        return cache

    def _check(self, found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> None:
        """Raise ValueError unless both are the same, up to the rounding of the network's dtype."""
        if found.shape != expected.shape:
            raise ValueError(f"a trial gave {tuple(found.shape)} numbers in place of {tuple(expected.shape)}.")
        tolerance = tolerances.get(next(self._network.parameters()).dtype, _TOLERANCE)
        distance = (found.float() - expected.float()).norm() / expected.float().norm()
        if not distance <= tolerance:
            raise ValueError(f"a trial was {float(distance):.1e} away from what it must equal.")


def prefill_padded(
    network: nn.Module, prompts: Sequence[Sequence[int]], cache: PreallocatedCache | StatefulCache
) -> Tensor:
    """Compute the prompts side by side, padded on the left.

    Args:
        network: A causal language model.
        prompts: The token ids of each prompt, at least one token each.
        cache: An empty cache, which gets a row for each prompt.

    Returns:
        The logits of the token that follows each prompt, [prompts, V].
    """
    device = next(network.parameters()).device
    longest = max(map(len, prompts))
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    output = network(
        input_ids=torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device),
        attention_mask=padding_mask(prompts, device),
        position_ids=(torch.arange(longest, device=device) - (longest - lengths)).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_token(device),
    )
    return output.logits[:, -1]


def prefill_packed(network: nn.Module, prompts: Sequence[Sequence[int]], cache: PreallocatedCache) -> Tensor:
    """Compute the prompts as one packed batch, and fill the cache as :func:`prefill_padded` does.

    Args:
        network: A causal language model whose attention computes packed batches.
        prompts: The token ids of each prompt, at least one token each.
        cache: An empty cache, which gets a row for each prompt.

    Returns:
        The logits of the token that follows each prompt, [prompts, V].

    Raises:
        ValueError: A layer cannot be packed, or is not what the cache takes it for.
    """
    device = next(network.parameters()).device
    # A packed sequence is computed without its last token, so one is added, which stands for the first sampled one.
    batch = pack([(*prompt, 0) for prompt in prompts], [len(prompt) for prompt in prompts], keeps_keys=True)
    batch = batch.to(device)
    output = network(**batch.model_inputs(), logits_to_keep=batch.predictor)
    longest = max(map(len, prompts))
    packed_tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, path in zip(packed_tokens, batch.layout.trie.paths, strict=True):
        row[longest - len(path) :] = torch.from_numpy(path)
    packed_tokens = packed_tokens.to(device)
    for layer, passes in batch.layout.give_away():
        index = getattr(layer, "layer_idx", None)
        cache_layer = cache.layers[index] if index is not None and index < len(cache.layers) else None
        if len(passes) != 1 or not isinstance(cache_layer, PreallocatedLayer) or cache_layer.is_initialized:
            raise ValueError(f"{type(layer).__name__} has no place of its own in the cache.")
        cache_layer.update(*(states[:, packed_tokens].transpose(0, 1) for states in passes[0]))
    if not all(layer.is_initialized for layer in cache.attention_layers):
        raise ValueError("Not all layers of the cache were filled by packed attention.")
    return output.logits[0]


def padding_mask(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Mark tokens with 1 and the padding before them with 0, [prompts, longest]; None where nothing is padded."""
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return None
    return (torch.arange(longest, device=device) >= longest - lengths).long()


def last_token(device: torch.device) -> Tensor:
    """The index of the last token, for ``logits_to_keep``.

    The number 1 would stand for a slice, which is not contiguous, and for such an input the output head copies its
    whole weight once per row.
    """
    return torch.tensor([-1], device=device)
