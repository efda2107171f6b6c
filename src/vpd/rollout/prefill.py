"""The prompts' own pass: packed, so that what prompts begin with is computed once and nothing is padded; or, for
networks that cannot be packed and on other devices than processors, padded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vpd.packing import pack, packable
from vpd.rollout.kv_cache import PreallocatedCache, PreallocatedLayer, StatefulCache, make_cache

logger = logging.getLogger(__name__)

_LONGEST_WINDOW = 1024
"""Tokens of a sliding window that the trial goes beyond."""

_STATES_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02}
_LOGITS_TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.05}
_TOLERANCE = 0.01
"""How far keys and values, or logits, may be from those they must equal, as a part of their length; the last is that of
other dtypes. Rounding to bfloat16 takes SmolLM2-135M's 0.015 and 0.06 away; where tokens see what they must not, 0.2 to
0.5 and 0.9 (both by hand)."""


class Prefill:
    """Computes prompts and fills a cache with them, in the way that a network was found to allow.

    Architectures hide state in places that no configuration names, and change keys on their way from the cache to
    attention; so a few tokens are tried in both ways first. A trial that fails costs speed alone: the log says why.

    Args:
        network: a causal language model with :mod:`vpd.rollout.decode_attention`, in evaluation mode.

    Attributes:
        packs: whether prompts are packed.
        shares: whether generations may share their prompts (:meth:`PreallocatedCache.share`).
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._config = cast(PreTrainedModel, network).config
        self.packs = self.shares = False
        device = next(network.parameters()).device
        if device.type != "cpu" or isinstance(make_cache(self._config, max_length=1), StatefulCache):
            return
        with torch.no_grad():
            self.packs = self._succeeds(self._try_packing, "Prompts are padded, not packed")
            self.shares = self._succeeds(self._try_sharing, "Generations of a prompt do not share its cache")

    def __call__(self, prompts: Sequence[Sequence[int]], cache: PreallocatedCache | StatefulCache) -> Tensor:
        """Logits [prompts, V] behind each prompt's last token; the cache, an empty one, gets a row for each prompt."""
        if self.packs and isinstance(cache, PreallocatedCache):
            return packed(self._network, prompts, cache)
        return padded(self._network, prompts, cache)

    def _succeeds(self, trial: Callable[[], None], consequence: str) -> bool:
        try:
            trial()
        except Exception as error:
            # Whatever it is: what is tried for speed must not stop a run.
            logger.info("%s: %s", consequence, error)
            return False
        return True

    def _try_packing(self) -> None:
        possible, reason = packable(self._network)
        if not possible:
            raise ValueError(reason)
        window = getattr(self._config.get_text_config(), "sliding_window", None) or 0
        prompts = self._prompts(5 + (window if window <= _LONGEST_WINDOW else 0))
        together, side_by_side = self._cache(prompts), self._cache(prompts)
        found, expected = packed(self._network, prompts, together), padded(self._network, prompts, side_by_side)
        self._check(found, expected, _LOGITS_TOLERANCE)
        for layers in zip(together.attention_layers, side_by_side.attention_layers, strict=True):
            for states, others in zip(*((layer.keys, layer.values) for layer in layers), strict=True):
                assert states is not None
                assert others is not None
                for row, other, prompt in zip(states, others, prompts, strict=True):
                    # Without the padding.
                    self._check(row[:, -len(prompt) :], other[:, -len(prompt) :], _STATES_TOLERANCE)

    def _try_sharing(self) -> None:
        """One step of decoding with prompts shared, and with a copy for each row."""
        prompts, rows = self._prompts(5), [0, 1, 1, 2]
        shared, copied = self._cache(prompts), self._cache(prompts)
        if shared.places_matter:
            raise ValueError("places in the cache matter to attention.")
        for cache in (shared, copied):
            padded(self._network, prompts, cache)
        mask = mask_of(prompts, torch.device("cpu"))
        assert mask is not None
        shared.share(rows, mask, least=0)
        copied.expand(torch.tensor(rows))
        seen = nn.functional.pad(mask[rows], (0, 1), value=1)
        found, expected = (
            self._network(
                input_ids=torch.tensor([prompts[row][:1] for row in rows]),
                attention_mask=seen if cache is copied else None,
                position_ids=torch.tensor([[len(prompts[row])] for row in rows]),
                past_key_values=cache,
                use_cache=True,
            ).logits
            for cache in (shared, copied)
        )
        self._check(found, expected, _LOGITS_TOLERANCE)

    def _prompts(self, longest: int) -> list[list[int]]:
        """Three, of different lengths, two of which begin alike."""
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


def padded(network: nn.Module, prompts: Sequence[Sequence[int]], cache: PreallocatedCache | StatefulCache) -> Tensor:
    """Run the prompts side by side, padded on the left.

    Args:
        network: a causal language model.
        prompts: token ids, one at least of each prompt.
        cache: an empty one, which is filled.

    Returns:
        [prompts, V], the logits behind each prompt's last token.
    """
    device = next(network.parameters()).device
    longest = max(map(len, prompts))
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    output = network(
        input_ids=torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device),
        attention_mask=mask_of(prompts, device),
        position_ids=(torch.arange(longest, device=device) - (longest - lengths)).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_place(device),
    )
    return output.logits[:, -1]


def packed(network: nn.Module, prompts: Sequence[Sequence[int]], cache: PreallocatedCache) -> Tensor:
    """Run the prompts as one packed batch, and fill the cache as :func:`padded` does.

    Args:
        network: a causal language model whose attention computes packed batches.
        prompts: token ids, one at least of each prompt.
        cache: an empty one, which is filled.

    Raises:
        ValueError: a layer cannot be packed, or is not what the cache takes it for.
    """
    device = next(network.parameters()).device
    # Without its last token, which stands for the first one to be sampled, a sequence is the prompt.
    batch = pack([(*prompt, 0) for prompt in prompts], [len(prompt) for prompt in prompts], keeps_keys=True)
    batch = batch.to(device)
    output = network(**batch.model_inputs(), logits_to_keep=batch.predictor)
    longest = max(map(len, prompts))
    places = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, path in zip(places, batch.layout.trie.paths, strict=True):
        row[longest - len(path) :] = torch.from_numpy(path)
    places = places.to(device)
    for layer, passes in batch.layout.give_away():
        index = getattr(layer, "layer_idx", None)
        slot = cache.layers[index] if index is not None and index < len(cache.layers) else None
        if len(passes) != 1 or not isinstance(slot, PreallocatedLayer) or slot.is_initialized:
            raise ValueError(f"{type(layer).__name__} has no place of its own in the cache.")
        slot.update(*(states[:, places].transpose(0, 1) for states in passes[0]))
    if not all(layer.is_initialized for layer in cache.attention_layers):
        raise ValueError("Not all layers of the cache were filled by packed attention.")
    return output.logits[0]


def mask_of(prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """[prompts, longest], 1 for tokens and 0 for the padding before them; None where there is none."""
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        return None
    return (torch.arange(longest, device=device) >= longest - lengths).long()


def last_place(device: torch.device) -> Tensor:
    """The last token's place, for ``logits_to_keep``.

    The number 1 stands for a slice there, which is not contiguous, and for such an input the output head copies its
    whole weight once per row.
    """
    return torch.tensor([-1], device=device)
