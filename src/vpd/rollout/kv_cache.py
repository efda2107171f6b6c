"""Key-value caches for the decode loop: rows share prompts, storage grows rarely, and a row leaves cheaply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from vpd.rollout.prompt_groups import PromptGroups

MIN_GROWTH = 64
"""The fewest tokens that storage grows by: smaller growth would copy so often that the memory saved is not worth it."""


class PreallocatedLayer(CacheLayerMixin):
    """The keys and values of one attention layer, written in place into storage that is larger than what is filled.

    Sliding-window layers use it too: all positions are kept, and the attention mask, which transformers builds from the
    positions, hides those outside the window.

    Rows can also share their prompts (:meth:`share_prompts`): the storage then holds only what follows the prompts, and
    attention, which finds the layer by :func:`layer_of`, reads the prompts' keys and values from ``prompt_states``.

    Args:
        max_length: The largest number of tokens that a row will ever have; storage never grows beyond it.

    Attributes:
        length: How many tokens a row has, those of a shared prompt included.
        groups: Which rows share which prompt, or None where each row stores its own prompt.
        prompt_states: The keys and the values of the shared prompts, each [prompts, heads, P, width], or None where
            each row stores its own prompt.
    """

    is_sliding = False

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.rows = 0
        self.length = 0
        self.groups: PromptGroups | None = None
        self.prompt_states: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over the prefill's own tensors; room to grow is allocated when rows are expanded or get more tokens."""
        self.keys, self.values = key_states, value_states
        self.rows, _, self.length, _ = key_states.shape
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the states [rows, heads, new, width]; returns views of all that is stored, new tokens included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return self._marked(key_states.view_as(key_states)), self._marked(value_states.view_as(value_states))
        assert self.keys is not None
        assert self.values is not None
        start = self._stored
        self.length += key_states.shape[-2]
        if self._stored > self.keys.shape[-2]:
            self.keys = self._enlarged(self.keys, start)
            self.values = self._enlarged(self.values, start)
        keys = self.keys[: self.rows, :, : self._stored]
        values = self.values[: self.rows, :, : self._stored]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return self._marked(keys), self._marked(values)

    @property
    def _stored(self) -> int:
        """How many tokens of each row are in the storage."""
        return self.length - (0 if self.prompt_states is None else self.prompt_states[0].shape[-2])

    def _marked(self, states: Tensor) -> Tensor:
        """The states with a mark by which :func:`layer_of` finds this layer."""
        states.cache_layer = self  # pyright: ignore[reportAttributeAccessIssue]
        return states

    def _enlarged(self, storage: Tensor, filled: int) -> Tensor:
        larger = self._allocate(storage, self.rows)
        larger[:, :, :filled] = storage[: self.rows, :, :filled]
        return larger

    def _allocate(self, like: Tensor, rows: int) -> Tensor:
        shared = self.length - self._stored
        capacity = min(self.max_length - shared, self._stored + max(MIN_GROWTH, self._stored // 2))
        capacity = max(self._stored, capacity)
        return like.new_empty(rows, like.shape[1], capacity, like.shape[3])

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def expand(self, sources: Tensor) -> None:
        """Make row i a copy of row ``sources[i]``, with room to grow."""
        if self.keys is None or self.values is None:
            return
        for name, storage in (("keys", self.keys), ("values", self.values)):
            expanded = self._allocate(storage, len(sources))
            # A gathered copy in between would double the peak, so the rows go straight into the new storage.
            torch.index_select(storage[:, :, : self.length], 0, sources, out=expanded[:, :, : self.length])
            setattr(self, name, expanded)
        self.rows = len(sources)

    def share_prompts(self, groups: PromptGroups) -> None:
        """Let the rows of each group share the prompt that is stored, and store only what follows it."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = (states[:, :, : self.length].contiguous() for states in (self.keys, self.values))
        self.prompt_states, self.groups, self.rows = (keys, values), groups, len(groups.prompt_of_row)
        self.keys, self.values = self._allocate(keys, self.rows), self._allocate(values, self.rows)

    def copy_prompts(self) -> None:
        """Give each row a copy of the prompt that it has shared."""
        assert self.groups is not None
        assert self.prompt_states is not None
        assert self.keys is not None
        assert self.values is not None
        shared, stored = self.length - self._stored, self._stored
        sources = torch.tensor(self.groups.prompt_of_row, device=self.keys.device)
        pairs = zip(self.prompt_states, (self.keys, self.values), strict=True)
        self.groups = self.prompt_states = None
        self.keys, self.values = (self._joined(prompts, sources, own[:, :, :stored], shared) for prompts, own in pairs)

    def _joined(self, prompts: Tensor, sources: Tensor, own: Tensor, shared: int) -> Tensor:
        storage = self._allocate(prompts, self.rows)
        torch.index_select(prompts, 0, sources, out=storage[:, :, :shared])
        storage[:, :, shared : self.length] = own[: self.rows]
        return storage

    def compact(self, count: int, holes: Tensor, fillers: Tensor) -> None:
        """Copy rows ``fillers`` into rows ``holes``, and keep the first ``count`` rows."""
        if self.keys is None or self.values is None:
            return
        if len(holes):
            for storage in (self.keys, self.values):
                filled = storage[:, :, : self._stored]
                filled[holes] = filled[fillers]
        self.rows = count


def layer_of(keys: Tensor, values: Tensor) -> PreallocatedLayer | None:
    """Find the layer whose :meth:`PreallocatedLayer.update` has returned both tensors; None for other tensors."""
    layer = getattr(keys, "cache_layer", None)
    return layer if layer is getattr(values, "cache_layer", None) else None


class PreallocatedCache(Cache):
    """A cache whose attention layers are :class:`PreallocatedLayer`; other layers hold nothing.

    Args:
        layers: The cache's part for each layer of the model.
        depends_on_index: Whether attention depends on the index at which a key stands in the cache, and not on the
            positions of tokens alone. Rows cannot share prompts then, because a shared prompt does not stand among the
            row's own keys.

    Attributes:
        attention_layers: The layers that hold keys and values.
    """

    def __init__(self, layers: Sequence[PreallocatedLayer | DummyLayer], *, depends_on_index: bool):
        super().__init__(layers=list(layers))
        self.depends_on_index = depends_on_index
        self.attention_layers = [layer for layer in layers if isinstance(layer, PreallocatedLayer)]
        self._groups: PromptGroups | None = None
        self._key_numbers = 0

    @property
    def shares_prompts(self) -> bool:
        """Whether rows share their prompts; attention takes no mask then."""
        return self._groups is not None

    def share_prompts(
        self, prompt_of_row: Sequence[int], mask: Tensor | None, minimum_saving: int | None = None
    ) -> bool:
        """Let rows share the stored prompts where this saves enough.

        Attention must know of sharing and must take positions from nothing but the keys;
        :class:`vpd.rollout.prefill.Prefill` finds out whether it does.

        Args:
            prompt_of_row: For each row to come, the number of its prompt among the stored ones.
            mask: See :class:`PromptGroups`.
            minimum_saving: See :class:`PromptGroups`.

        Returns:
            Whether rows share prompts now. If not, nothing has changed.
        """
        keys = self.attention_layers[0].keys
        assert keys is not None
        groups = PromptGroups(prompt_of_row, mask, keys.dtype, keys.device, minimum_saving)
        self._key_numbers = keys.shape[1] * self.attention_layers[0].length * keys.shape[3]
        if not groups.save_enough(self._key_numbers):
            return False
        for layer in self.attention_layers:
            layer.share_prompts(groups)
        self._groups = groups
        return True

    def expand(self, sources: Tensor) -> None:
        """Make row i of every layer a copy of row ``sources[i]``; the number of rows may change."""
        for layer in self.attention_layers:
            layer.expand(sources)

    def keep_rows(self, kept: list[int], device: torch.device) -> list[int]:
        """Keep the given rows (ascending) and return their new order: entry i is the row that is now row i.

        The last rows move into the holes, so that a row that leaves costs the copy of one row and not of the batch.
        """
        order, holes, fillers = compaction(kept)
        hole_rows = torch.tensor(holes, dtype=torch.long, device=device)
        filler_rows = torch.tensor(fillers, dtype=torch.long, device=device)
        for layer in self.attention_layers:
            layer.compact(len(kept), hole_rows, filler_rows)
        if self._groups is not None:
            self._groups.keep_rows(order)
            if not self._groups.save_enough(self._key_numbers):
                self._groups = None
                for layer in self.attention_layers:
                    layer.copy_prompts()
        return order


class StatefulCache(DynamicCache):
    """transformers' own cache, for models with layers that carry a state from token to token."""

    shares_prompts = False

    def expand(self, sources: Tensor) -> None:
        """Make row i of every layer a copy of row ``sources[i]``; the number of rows may change."""
        self.reorder_cache(sources)  # pyright: ignore[reportArgumentType]

    def keep_rows(self, kept: list[int], device: torch.device) -> list[int]:
        """Keep the given rows and return their new order: entry i is the row that is now row i."""
        self.expand(torch.tensor(kept, dtype=torch.long, device=device))
        return kept


def compaction(kept: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Find the fewest moves that bring the ``kept`` rows (ascending) to the front.

    Returns:
        The order (entry i is the row that comes to place i), the places that get another row, and those rows.
    """
    count = len(kept)
    fillers = [row for row in kept if row >= count]
    in_place = set(kept)
    holes = [place for place in range(count) if place not in in_place]
    order = list(range(count))
    for place, row in zip(holes, fillers, strict=True):
        order[place] = row
    return order, holes, fillers


def make_cache(config: PreTrainedConfig, max_length: int) -> PreallocatedCache | StatefulCache:
    """Make an empty cache for a model of this config.

    Args:
        config: The model's config.
        max_length: The largest number of tokens that a row will have, padding included.

    Returns:
        A :class:`StatefulCache` where rows must not be padded, because a layer's state would take the padding in.
    """
    dynamic = StatefulCache(config=config)
    # Subclasses of these layers hold more than keys and values, so the types are compared exactly.
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer) for layer in dynamic.layers):
        return dynamic
    return PreallocatedCache(
        [layer if isinstance(layer, DummyLayer) else PreallocatedLayer(max_length) for layer in dynamic.layers],
        # Windows are counted by index, as are the distances of ALiBi (MPT) and GPT-Neo's local attention, while rotary
        # embeddings put the position into the key.
        depends_on_index=any(isinstance(layer, DynamicSlidingWindowLayer) for layer in dynamic.layers)
        or not getattr(config, "rope_parameters", None),
    )
