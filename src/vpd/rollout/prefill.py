"""The prompts' own pass: packed, so that what prompts begin with is computed once and nothing is padded; or, for
networks that cannot be packed, padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpd.packing import pack, packable
from vpd.rollout.cache import PreallocatedCache, StatefulCache, make_cache

_TRIED = [(0, 1, 2, 3, 4), (0, 1, 2, 4), (3, 1)]

_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.2, torch.float16: 0.05}
"""How far packed logits, keys and values may be from padded ones, as a part of their length. Rounding to bfloat16 takes
the logits of a model of 30 layers 0.06 away; where tokens see what they must not, they are 0.6 to 0.9 away."""


class Prefill:
    """Computes prompts and fills a cache with them, in the way that a network was found to allow.

    Architectures hide state in places that no configuration names, and change keys on their way from the cache to
    attention; so a few tokens are tried in both ways first.

    Args:
        network: a causal language model with :mod:`vpd.rollout.attention`, in evaluation mode.

    Attributes:
        packs: whether prompts are packed.
        shares: whether generations may share their prompts (:meth:`PreallocatedCache.share`).
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.packs = self.shares = False
        caches = [make_cache(network.config, max_length=len(_TRIED[0])) for _ in range(2)]  # pyright: ignore[reportArgumentType]
        side_by_side, together = caches
        if isinstance(side_by_side, StatefulCache) or isinstance(together, StatefulCache):
            return
        logits = padded(network, _TRIED, side_by_side)
        self.shares = not side_by_side.places_matter and all(
            layer.knows_groups for layer in side_by_side.attention_layers
        )
        if not packable(network)[0]:
            return
        try:
            pairs = [(packed(network, _TRIED, together), logits)]
        except (ValueError, TypeError, AttributeError):
            return
        pairs += [
            (_without_padding(states), _without_padding(expected))
            for layers in zip(together.attention_layers, side_by_side.attention_layers, strict=True)
            for states, expected in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        ]
        self.packs = all(map(_are_close, *zip(*pairs, strict=True)))

    def __call__(self, prompts: Sequence[Sequence[int]], cache: PreallocatedCache | StatefulCache) -> Tensor:
        """Logits [prompts, V] behind each prompt's last token; the cache, an empty one, gets a row for each prompt."""
        if self.packs and isinstance(cache, PreallocatedCache):
            return packed(self._network, prompts, cache)
        return padded(self._network, prompts, cache)


def padded(network: nn.Module, prompts: Sequence[Sequence[int]], cache: object) -> Tensor:
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
    mask = mask_of(prompts, device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    output = network(
        input_ids=torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device),
        attention_mask=mask,
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
    batch = pack([(*prompt, 0) for prompt in prompts], [len(prompt) for prompt in prompts], lends=True)
    batch = batch.to(device)
    output = network(**batch.model_inputs(), logits_to_keep=batch.predictor)
    longest = max(map(len, prompts))
    places = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, path in zip(places, batch.layout.trie.paths, strict=True):
        row[longest - len(path) :] = torch.from_numpy(path)
    places = places.to(device)
    for layer, passes in batch.layout.kept.items():
        index = getattr(layer, "layer_idx", None)
        if len(passes) != 1 or index is None or index >= len(cache.layers):
            raise ValueError(f"{type(layer).__name__} has no place of its own in the cache.")
        keys, values = (states[:, places].transpose(0, 1) for states in passes[0])
        cache.update(keys, values, index)
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


def _without_padding(states: Tensor | None) -> Tensor:
    """The tried prompts' states, one after another."""
    assert states is not None
    rows = zip(states, map(len, _TRIED), strict=True)
    return torch.cat([row[:, row.shape[1] - length :] for row, length in rows], dim=1)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE.get(expected.dtype, 0.0)
    return bool((found.float() - expected.float()).norm() <= tolerance * expected.float().norm())
